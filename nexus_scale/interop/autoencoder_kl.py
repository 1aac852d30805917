"""A diffusers AutoencoderKL folder (Stable Diffusion's, SD3's, FLUX's) as the VAE of a data pipeline or a sampler.

Local folders only, safetensors only, and no code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import read_config, stated_by, weight_files

CLASS_NAME = "AutoencoderKL"
SCALE = 0.18215
"""Of a config without `scaling_factor`, as the first Stable Diffusion's are."""


class AutoencoderKLFolder:
    """An AutoencoderKL in eval mode, without gradients.

    Attributes:
        latent_channels: C.
        downsampling: pixels a latent place spans on each side (8 for Stable Diffusion).
        fingerprint: XXH3-128 over settings and weights, hexadecimal: what manifests of its latents carry.
        stated: (z - shift_factor) * scaling_factor of its config, see `folders.stated_by`.
    """

    def __init__(self, folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        """
        Args:
            folder: saved by `AutoencoderKL.save_pretrained`, or a pipeline's with `vae/` in it.
            dtype: what it computes in; results are float32 whatever it is.
        Raises:
            UserError: no such folder, another class, no safetensors, or weights that do not fit the config.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            folder = folder / "vae"
        config, files = read_config(folder, CLASS_NAME), weight_files(folder)
        self.fingerprint = _fingerprint(config, files)
        self._vae = _load(folder, dtype).to(device)
        self.device, self.dtype = torch.device(device), dtype
        self.latent_channels = int(self._vae.config.latent_channels)
        self.stated = stated_by(config, folder, self.latent_channels, SCALE)
        self.downsampling = 2 ** (len(self._vae.config.block_out_channels) - 1)

    def check(self, shape: Sequence[int]) -> None:
        """Raises a ValueError for anything but an image (3, H, W) of multiples of `downsampling` pixels; says what to change."""
        if len(shape) != 3:
            raise ValueError(f"got clips; {CLASS_NAME} is for images: name an autoencoder for clips")
        height, width = shape[1:]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(f"images of {height} x {width}: crop them to multiples of {self.downsampling} pixels")

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 3, H, W) -> posterior moments, (B, 2C, h, w) float32: mean, then log-variance.

        Raises:
            ValueError: height or width is no multiple of `downsampling`.
        """
        self.check(x.shape[1:])
        return self._vae.encode(x.to(self.device, self.dtype)).latent_dist.parameters.float()

    @torch.no_grad()
    def decode(self, z: Tensor, frames: int | None = None) -> Tensor:
        """Latents as `encode` gives them (neither scaled nor shifted), (B, C, h, w) -> (B, 3, H, W) float32; images have no `frames`."""
        return self._vae.decode(z.to(self.device, self.dtype)).sample.float()


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("an AutoencoderKL folder needs diffusers; pip install 'nexus-scale[hf]'") from None
    try:
        vae, report = AutoencoderKL.from_pretrained(
            str(folder.resolve()),
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: diffusers cannot load it as {CLASS_NAME} ({error})") from None
    # diffusers fills what the file lacks with random values and goes on; we do not
    if report["missing_keys"]:
        raise UserError(
            f"{folder}: weights lack {len(report['missing_keys'])} tensors, among them {report['missing_keys'][0]}"
        )
    return vae.eval().requires_grad_(False)


def _fingerprint(config: dict[str, Any], files: list[Path]) -> str:
    """Settings without diffusers' own notes (`_diffusers_version`, paths), then the bytes of the weights."""
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
