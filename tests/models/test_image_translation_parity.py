"""Networks of pix2pix and CycleGAN against the numbers of their released code, through the format that `nexus export` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.published import family
from nexus_scale.models.gan.patch_discriminator import PatchDiscriminator
from nexus_scale.models.gan.translation_resnet import TranslationResnet
from nexus_scale.models.gan.translation_unet import TranslationUnet
from tests.golden import image_translation as golden

NETWORKS = {
    "resnet": ("translation_resnet", TranslationResnet),
    "unet": ("translation_unet", TranslationUnet),
    "patches": ("patch_discriminator", PatchDiscriminator),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", golden.CASES)
def test_they_compute_what_the_released_code_computes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Outputs and gradients, of odd sizes and norms of both kinds; weights read from a file of theirs, which comes back to the bit."""
    registered, cls = NETWORKS[golden.CASES[name][0]]
    sizes, (_, norm, _, (channels, _, _)) = golden.CASES[name][2], golden.CASES[name]
    form = family(registered).formats["original"]
    own = {"image_channels" if registered == "patch_discriminator" else "in_channels": channels}
    if registered == "translation_unet":
        own |= {"image_size": 2 ** sizes["depth"]}
    given = {**own, **sizes, "norm": "instance" if norm == "instance" else "affine_instance"}
    net = cls(**given).eval()  # type: ignore[arg-type]
    theirs = form.theirs_of(net, dict(net.state_dict()))
    places = sorted(theirs, key=by_place)
    golden.fill(theirs[key] for key in places)
    form.write(tmp_path, form.to_ours(None, theirs, given)[1], given)
    arguments, state = form.read(tmp_path / form.file)
    assert {key: arguments[key] for key in given if key != "image_size"} == {
        key: given[key] for key in given if key != "image_size"
    }
    assert all(torch.equal(value, theirs[key]) for key, value in form.theirs_of(net, state).items())
    net = cls(**arguments)  # type: ignore[arg-type]
    net.load_state_dict(state)
    net = net.to(dtype).eval()
    got = golden.found(net, name)
    gradients = form.theirs_of(net, {key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    got["squares"] = golden.squares(gradients[key] for key in places)
    stored = np.load(golden.FILE, allow_pickle=False)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for what, value in got.items():
        expected = torch.from_numpy(stored[f"{name}/{what}"]).double()
        assert float((value.double() - expected).norm() / expected.norm()) < tolerance, what


def by_place(key: str) -> tuple[list[int], bool]:
    """Sorts their tensors as they stand in their network."""
    return [int(part) for part in key.split(".") if part.isdigit()], key.endswith("bias")


def test_sizes_of_the_papers() -> None:
    """As their code prints them: 11.378 M and 54.414 M of the generators, 2.765 M and 2.769 M of the discriminators."""
    with torch.device("meta"):
        nets = (
            TranslationResnet(),
            TranslationUnet(),
            PatchDiscriminator(norm="instance"),
            PatchDiscriminator(image_channels=6, norm="affine_instance"),
        )
        assert [sum(p.numel() for p in net.parameters()) for net in nets] == [11378179, 54413955, 2764737, 2768705]
        seen = nets[2](torch.zeros(1, 3, 70, 70))
        assert seen.shape == (1, 1, 6, 6), "a patch of 70 x 70 pixels, of which padding is a part, gives 36 logits"


def test_what_they_refuse() -> None:
    for make, named in (
        (lambda: TranslationUnet(image_size=24, depth=4), "image_size"),
        (lambda: TranslationUnet(image_size=16, depth=5), "depth"),
        (lambda: TranslationUnet(dropout=1.0), "dropout"),
        (lambda: TranslationResnet(dropout=-0.1), "dropout"),
    ):
        with pytest.raises(UserError, match=named):
            make()
    with torch.device("meta"):
        for net, shape in ((TranslationResnet(hidden_size=2), (10, 12)), (TranslationUnet(hidden_size=2), (256, 128))):
            with pytest.raises(ValueError, match="multiples"):
                net(torch.zeros(1, 3, *shape))
        grouped = PatchDiscriminator(hidden_size=4, depth=1, num_groups=2)
    with pytest.raises(UserError, match="group"):
        family("patch_discriminator").formats["original"].to_theirs(
            dict(grouped.state_dict()), {"hidden_size": 4, "depth": 1, "num_groups": 2}
        )
