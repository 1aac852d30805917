"""A detector that a user names finds what transformers finds with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from nexus_scale.contracts import UserError
from nexus_scale.interop.detectors import find_detector
from nexus_scale.metrics.scenes import SURE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny YOLOS, which is DETR on a ViT, that is sure of what it sees."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32], patch_size=8,
        num_detection_tokens=5, id2label={0: "apple", 1: "dog"}, use_mid_position_embeddings=False,
    )  # fmt: skip
    net = YolosForObjectDetection(config)
    for parameter in net.class_labels_classifier.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    folder = tmp_path_factory.mktemp("detectors") / "yolos"
    net.save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(folder)
    return folder


def test_boxes_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoImageProcessor, YolosForObjectDetection

    detector = find_detector({"folder": folder.name}, folder.parent)
    assert detector.names == ("apple", "dog")
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = detector.boxes(images)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = [((image + 1) * 127.5).round().byte() for image in images]
    with torch.no_grad():
        output = YolosForObjectDetection.from_pretrained(folder).eval()(**processor(pixels, return_tensors="pt"))
    theirs = processor.post_process_object_detection(output, threshold=SURE, target_sizes=[(24, 40)] * 2)
    assert sum(len(one.names) for one in ours) > 2
    for mine, one in zip(ours, theirs, strict=True):
        assert mine.names == [("apple", "dog")[label] for label in one["labels"]]
        torch.testing.assert_close(mine.scores, one["scores"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.boxes, one["boxes"], atol=1e-3, rtol=1e-5)


def test_what_is_no_detector_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected \{folder: PATH\}"):
        find_detector({"package": "x"}, tmp_path)
    with pytest.raises(UserError, match="detr-resnet-50"):
        find_detector({"folder": "nowhere"}, tmp_path)
    (tmp_path / "vit").mkdir()
    said = json.loads((folder / "config.json").read_text()) | {"architectures": ["ViTModel"]}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="expected a model for object detection"):
        find_detector({"folder": "vit"}, tmp_path)
