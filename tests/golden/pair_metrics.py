"""What public packages say of known pairs, and the features that they give: `python -m tests.golden.pair_metrics`.

Needs torch-fidelity 0.4.0, clean-fid 0.1.35, lpips 0.1.4, torchmetrics 1.9.0 and scikit-image 0.26.0, with a torchvision of the very build
of torch. Writes pair_metrics.json beside this file. Networks have weights that follow from their names, since nobody downloads any here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.metrics.inception import InceptionV3

FILE = Path(__file__).with_suffix(".json")
SPOKEN = (
    ["The train leaves at nine, doesn't it?", "One two three four", "A sentence that is not heard", "naïve café"],
    ["the rain leaves nine doesn't it", "two three four five", "", "naive cafe please"],
)
WANGS: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
"""The window of the paper, in scikit-image's words."""
TRUNKS = ("alex", "vgg")
PLACES = 40
"""Values that are kept of each kind of features, evenly spaced."""


def images(seed: int, side: int, count: int = 2) -> Tensor:
    """Smooth patterns and noise, (count, 3, side, side) uint8."""
    drawn = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in drawn.uniform(0.5, 4, (3 * count, 3))]
    pixels = 127 + 80 * np.stack(waves) + 25 * drawn.standard_normal((3 * count, side, side))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).view(count, 3, side, side)


def pair(side: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], float64, and the same with noise, more in the second."""
    x = images(1, side).double() / 127.5 - 1
    noise = np.random.Generator(np.random.PCG64(2)).standard_normal(x.shape)
    return x, (x + torch.from_numpy(noise) * torch.tensor([0.1, 0.4]).view(2, 1, 1, 1)).clamp(-1, 1)


def weights(shapes: Iterable[tuple[str, torch.Size]]) -> dict[str, Tensor]:
    """A state dict: what a name says, drawn by a hash of it, at a size that keeps the signal's."""
    made = {}
    for name, shape in shapes:
        drawn = np.random.Generator(np.random.PCG64(xxhash.xxh64_intdigest(name.encode())))
        values = drawn.standard_normal(tuple(shape), dtype=np.float32)
        if len(shape) > 1:
            values *= np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.1 * np.abs(values)
        else:
            values *= 0.1
        made[name] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return made


def inception_shapes() -> list[tuple[str, torch.Size]]:
    """Of our network, whose names theirs must have to load them."""
    return [(n, t.shape) for n, t in InceptionV3().state_dict().items() if not n.endswith("num_batches_tracked")]


def heads(widths: Iterable[int]) -> dict[str, Tensor]:
    made = weights((f"lin{i}.model.1.weight", torch.Size((1, width, 1, 1))) for i, width in enumerate(widths))
    return {name: value.abs() for name, value in made.items()}


def some(features: Tensor) -> list[float]:
    """PLACES values of (B, ...), of all samples."""
    flat = features.double().flatten()
    return flat[torch.linspace(0, len(flat) - 1, PLACES).long()].tolist()


def _perceptual() -> dict[str, list[float]]:
    import lpips

    x, y = (one.float() for one in pair(64))
    found = {}
    for trunk in TRUNKS:
        net = lpips.LPIPS(net=trunk, pretrained=False, pnet_rand=True, verbose=False)
        names = {n: p.shape for n, p in net.state_dict().items() if n.startswith("net.")}
        # torchvision's names, by which the weights are drawn
        drawn = weights((f"features.{n.split('.', 2)[2]}", shape) for n, shape in names.items())
        state = {n: drawn[f"features.{n.split('.', 2)[2]}"] for n in names}
        tops = heads(net.chns)
        net.load_state_dict(state | tops | {n.replace("lin", "lins.", 1): t for n, t in tops.items()}, strict=False)
        with torch.no_grad():
            found[trunk] = net(x, y).flatten().tolist()
    return found


def _inception() -> dict[str, Any]:
    from cleanfid.resize import build_resizer
    from torch_fidelity import feature_extractor_inceptionv3 as theirs
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(weights(inception_shapes()), file)
        net = theirs.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    spatial: list[Tensor] = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: spatial.append(o[:, :7].flatten(1)))
    x = images(3, 48)
    pooled, logits = net(x)
    clean = build_resizer("clean")
    resized = np.stack([clean(one.permute(1, 2, 0).numpy()) for one in x])
    as_tensorflow = interpolate_bilinear_2d_like_tensorflow1x(x.float(), size=(299, 299), align_corners=False)
    return {
        "pooled": some(pooled),
        "logits": some(logits),
        "spatial": some(spatial[0]),
        "tensorflow": some(as_tensorflow),
        "clean": some(torch.from_numpy(resized).permute(0, 3, 1, 2)),
    }


def main() -> None:
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    from nexus_scale.metrics.wer import normalise

    said, heard = ([" ".join(normalise(text)) for text in texts] for texts in SPOKEN)
    found: dict[str, Any] = {"errors": [float(of(heard, said)) for of in (word_error_rate, char_error_rate)]}
    x, y = ((one + 1).numpy() for one in pair(40))
    found["ssim"] = [
        float(structural_similarity(*both, data_range=2.0, channel_axis=0, **WANGS)) for both in zip(x, y, strict=True)
    ]
    found["lpips"] = _perceptual()
    found["inception"] = _inception()
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
