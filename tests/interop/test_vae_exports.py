"""Exports of VAE, VQ-VAE and FSQ: what their folders' code computes is what our networks do, and weights come back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.config import registry
from nexus_scale.generate.export import export_run
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.published import family
from tests.generate.test_prompts import trained_on_made_up_data

SMALL = {"hidden_size": 6, "residual_size": 4, "depth": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "conv_vae": {"image_channels": 3, "image_size": 12, "latent_size": 3, "channels": (4, 6), "hidden_sizes": (9,), "numbers": 2},
    "vq_vae": {"image_size": 16, "latent_channels": 3, "codebook_size": 5, "stages": 3, **SMALL},
    "fsq_vae": {"image_size": 8, "levels": (5, 4), **SMALL},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_computes_and_comes_back(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = registry.find("models", name)(**NETWORKS[name])
    net.init_weights()
    if name == "vq_vae":
        net.quantizer.codebooks.normal_()
        net.quantizer.initialised.fill_(1)
    form = family(name).formats["diffusers"]
    form.write(tmp_path, net.state_dict(), NETWORKS[name])
    theirs = diffusers.AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True, local_files_only=True)
    x = torch.randn(2, 3, net.image_size, net.image_size).clamp(-1, 1)
    with torch.no_grad():
        if name == "conv_vae":
            out, mean, logvar = net(x)
            posterior = theirs.encode(x).latent_dist
            torch.testing.assert_close(posterior.mean, mean)
            torch.testing.assert_close(posterior.logvar, logvar)
            torch.testing.assert_close(theirs.decode(mean).sample, 2 * out[:, :3].sigmoid() - 1)
        else:
            assert torch.equal(theirs.encode(x), net.encode(x))
            torch.testing.assert_close(theirs(x), net(x).x_hat)
    arguments, state = form.read(tmp_path)
    assert registry.find("models", name)(**arguments).state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_a_run_is_traversed_exported_and_read_again(tmp_path: Path) -> None:
    """A row of pictures for each latent, and the weights that are drawn with in the exported folder."""
    place = trained_on_made_up_data(tmp_path, "beta_vae/tiny_fashion_mnist")
    drawn = draw_prompts(place, [], output=tmp_path / "drawn", traverse=3)
    assert len(list(drawn.glob("00*.png"))) == 4 * 3
    arguments, state = family("conv_vae").formats["diffusers"].read(export_run(place, output=tmp_path / "exported"))
    trained = Trained(place.run, place)
    assert arguments["latent_size"] == 4
    assert all(torch.equal(state[key], value) for key, value in trained.nets["model"].state_dict().items())
