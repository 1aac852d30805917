"""AutoencoderKL in diffusers, as tables; to the bit. And a folder of it (Stable Diffusion's, SD3's, FLUX's) as the VAE of a data pipeline
or a sampler.

Local folders only, safetensors only, and no code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop import decoding_in_strips
from nexus_scale.interop.folders import (
    copy_folder,
    network_folder,
    read_config,
    read_tensors,
    stated_by,
    weight_files,
    write_folder,
)
from nexus_scale.interop.formats import Apart, Format, Key, Table
from nexus_scale.interop.published import Family
from nexus_scale.interop.slices import slices
from nexus_scale.processes.latents import LatentStats

CLASS_NAME = "AutoencoderKL"
LARGE = 1 << 14
"""Latent places (1024 x 1024 pixels of Stable Diffusion's) above which an image is decoded in strips."""
SCALE = 0.18215
"""Of a config without `scaling_factor`, as the first Stable Diffusion's are."""

EXAMPLE = """import torch
from diffusers import AutoencoderKL

autoencoder = AutoencoderKL.from_pretrained(folder, local_files_only=True)
size = autoencoder.config.sample_size
images = torch.zeros(1, autoencoder.config.in_channels, size, size)  # in [-1, 1]
latents = autoencoder.encode(images).latent_dist.mean
again = autoencoder.decode(latents).sample
"""
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Of attention in folders saved before diffusers 0.13, such as Stable Diffusion's."""


def _residual(ours: str, theirs: str) -> Table:
    return {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}


def _table(net: Any) -> Table:
    """Names alone, but for queries, keys and values, which we fuse."""
    table: dict[str, Any] = {"to_moments": "quant_conv", "from_latents": "post_quant_conv"}
    for coder, stage, resample in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        middle = f"{coder}.mid_block"
        attention = f"{middle}.attentions.0"
        table |= {
            f"{coder}.conv_in": f"{coder}.conv_in",
            f"{coder}.norm_out": f"{coder}.conv_norm_out",
            f"{coder}.conv_out": f"{coder}.conv_out",
            f"{coder}.stages.#.resample.conv": f"{coder}.{stage}.#.{resample}.0.conv",
            f"{coder}.middle.attention.norm": f"{attention}.group_norm",
            f"{coder}.middle.attention.qkv": Apart(tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v"))),
            f"{coder}.middle.attention.proj": f"{attention}.to_out.0",
            f"{coder}.stages.#.blocks.#.shortcut": f"{coder}.{stage}.#.resnets.#.conv_shortcut",
            **_residual(f"{coder}.stages.#.blocks.#", f"{coder}.{stage}.#.resnets.#"),
            **_residual(f"{coder}.middle.block1", f"{middle}.resnets.0"),
            **_residual(f"{coder}.middle.block2", f"{middle}.resnets.1"),
        }
    return table


def normalised(latents: LatentStats | None) -> dict[str, Any]:
    """Settings by which a pipeline normalises as a run has learnt."""
    if latents is None:
        return {"scaling_factor": 1.0, "shift_factor": 0.0}
    if latents.factors is not None:
        scale, shift = latents.factors
        return {"scaling_factor": scale, "shift_factor": shift}
    raise UserError(
        f"{CLASS_NAME} has one scaling_factor and shift_factor for all channels; the latents are normalised as {latents}: make them with "
        "`statistics: whole` (precompute_latents)"
    )


DIFFUSERS = Format(
    "autoencoder_kl",
    "AutoencoderKL weights",
    _table,
    CLASS_NAME,
    config={
        "in_channels": Key(3, "image_channels"),
        "out_channels": Key(3, lambda net: net.image_channels),
        "sample_size": Key(32, "image_size"),
        "latent_channels": Key(4, "latent_channels"),
        "block_out_channels": Key((64,), "channels"),
        "layers_per_block": Key(1, "depth"),
        "norm_num_groups": Key(32, "num_groups"),
        "mid_block_add_attention": Key(True, "mid_attention"),
        "use_quant_conv": Key(True, "quant_conv"),
        "use_post_quant_conv": Key(True, lambda net: net.quant_conv),
        "down_block_types": Key(None, lambda net: ["DownEncoderBlock2D"] * len(net.channels)),
        "up_block_types": Key(None, lambda net: ["UpDecoderBlock2D"] * len(net.channels)),
    },
    constants={"act_fn": "silu"},
    free=("image_size",),
    old_names=OLD_NAMES,
    part="vae",
    example=EXAMPLE,
)

FAMILY = Family(
    {"diffusers": DIFFUSERS},
    scale=SCALE,
    normalised=normalised,
    alone={"scaling_factor": None, "shift_factor": None},
)


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
        folder = network_folder(folder, "vae")
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
        """Latents as `encode` gives them (neither scaled nor shifted), (B, C, h, w) -> (B, 3, H, W) float32; images have no `frames`.
        Images of over LARGE latent places are decoded in strips of rows."""
        whole = z.shape[-2] * z.shape[-1] <= LARGE or not decoding_in_strips.fits(self._vae.decoder)
        parts = [part.to(self.device, self.dtype) for part in slices(z)]
        if whole:
            return torch.cat([self._vae.decode(part).sample.float() for part in parts])
        return torch.cat([decoding_in_strips.decode_in_strips(self._vae, part).float() for part in parts])


def export_normalised(
    source: Path, folder: Path, stats: LatentStats | None, stated: LatentStats | None, *, shifts: bool
) -> None:
    """Writes the autoencoder in `source` so that a pipeline decodes latents that a run has learnt, normalised by `stats`.

    Where the run knows them as the autoencoder states, it is a copy. One factor and shift for all channels go into `scaling_factor` and
    `shift_factor`. What differs between channels goes into the 1 x 1 convolutions around the latents: pipelines know no such factors.

    Args:
        shifts: the pipeline heeds `shift_factor`; else a shift goes into the convolutions, too.
    """
    config, files = read_config(source, CLASS_NAME), weight_files(source)
    if stats is None:
        stats = LatentStats((0.0,), (1.0,))
    elif stats == stated:
        changes: dict[str, Any] = {
            "shift_factor": config.get("shift_factor") or 0.0,
            "scaling_factor": config.get("scaling_factor", SCALE),
        }
        by_channel = config.get("latents_mean") is not None or config.get("latents_std") is not None
        if not by_channel and (shifts or not changes["shift_factor"]):
            copy_folder(source, folder, config | changes)
            return
    if stats.factors is not None and (shifts or not stats.factors[1]):
        scale, shift = stats.factors
        factors = {"scaling_factor": scale, "shift_factor": shift, "latents_mean": None, "latents_std": None}
        copy_folder(source, folder, config | factors)
        return
    write_folder(folder, *_folded(config, read_tensors(files), stats))


def _folded(
    config: Mapping[str, Any], state: dict[str, Tensor], stats: LatentStats
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of an autoencoder whose latents are those of `state`, normalised: (z - mean) / std."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (stats.mean, stats.std))
    channels = int(config.get("latent_channels", 4))
    mean, std = mean.expand(channels), std.expand(channels)

    def convolution(name: str, size: int) -> tuple[Tensor, Tensor]:
        if f"{name}.weight" in state:
            return state[f"{name}.weight"].double()[:, :, 0, 0], state[f"{name}.bias"].double()
        return torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)

    dtype = state["decoder.conv_in.weight"].dtype
    weight, bias = convolution("quant_conv", 2 * channels)  # of mean and log-variance, which shifts by -2 log std
    scale = torch.cat((1 / std, torch.ones_like(std)))
    shift = torch.cat((-mean / std, -2 * std.log()))
    pairs = {"quant_conv": (weight * scale[:, None], bias * scale + shift)}
    weight, bias = convolution("post_quant_conv", channels)
    pairs["post_quant_conv"] = (weight * std, weight @ mean + bias)
    for name, (weight, bias) in pairs.items():
        state |= {f"{name}.weight": weight[:, :, None, None].to(dtype), f"{name}.bias": bias.to(dtype)}
    changes = {
        "use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None,
        "latents_std": None,
    }  # fmt: skip
    return {**config, **changes}, state


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
    except Exception as error:  # whatever a library makes of settings that it does not check
        raise UserError(
            f"{folder}: diffusers cannot load it as {CLASS_NAME} ({type(error).__name__}: {error})"
        ) from None
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
