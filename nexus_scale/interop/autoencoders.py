"""Frozen autoencoders of images and clips: runs of ours, and folders of diffusers.

How its latents are normalised belongs to an autoencoder: what it states is in `stated`, and data made by it carry that. So does what
it encodes: latents are decoded to as many frames as they were encoded from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn

from nexus_scale.config import registry
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import recipe_from
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.interop.folders import network_folder, parsed_config, stated_by
from nexus_scale.interop.slices import slices
from nexus_scale.processes.latents import LatentStats


class Autoencoder(Protocol):
    """Images or clips to moments and back; a network of ours or of diffusers.

    Attributes:
        fingerprint: what manifests of its latents carry.
        latent_channels: C.
        stated: the normalisation that it was published with; None where it states none, and the data's statistics serve.
    """

    fingerprint: str
    latent_channels: int
    stated: LatentStats | None

    def check(self, shape: Sequence[int]) -> None:
        """Raises a UserError or ValueError for an image (3, H, W) or a clip (3, F, H, W) that it cannot take; says what to change."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], (B, 3, H, W) -> moments, (B, 2C, h, w) float32: mean, then log-variance; clips have F and f, too."""
        ...

    def decode(self, z: Tensor, frames: int | None = None) -> Tensor:
        """Latents as `encode` gives them, (B, C, h, w) -> images, (B, 3, H, W) float32; of clips those of `frames` frames. None: as
        many as the autoencoder is for, 1 + r * (f - 1) unless its own clips are others."""
        ...


class OwnAutoencoder:
    """A network of ours as an autoencoder.

    Args:
        family: its registered name.
        arguments: its constructor's.
        stated: the normalisation that it was published with.
        dtype: what it computes in; results are float32 whatever it is.
    """

    def __init__(
        self,
        network: nn.Module,
        family: str,
        arguments: Mapping[str, Any],
        device: torch.device | str = "cpu",
        stated: LatentStats | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.fingerprint = network_fingerprint(network, family, arguments)
        net: Any = network.eval().requires_grad_(False).to(device, dtype)
        self.device = torch.device(device)
        self.family, self.arguments, self.stated = family, dict(arguments), stated
        self.network = net
        self.latent_channels, self.takes_clips = int(net.latent_channels), len(net.latent_shape) == 4

    def check(self, shape: Sequence[int]) -> None:
        clip = len(shape) == 4
        if clip and not self.takes_clips:
            raise UserError(
                f"got clips; the autoencoder {self.family} is for images: name one for clips, such as causal_vae3d"
            )
        if self.takes_clips and not clip:
            raise UserError(
                f"got images; the autoencoder {self.family} is for clips, of which an image is one of 1 frame: make the images with "
                "ingest_clips and frames 1"
            )
        self.network.check_sizes(*shape[1:])

    @torch.inference_mode()
    def encode(self, x: Tensor) -> Tensor:
        moments: Tensor = self.network.encode(x.to(self.device)).float()
        return moments

    @torch.inference_mode()
    def decode(self, z: Tensor, frames: int | None = None) -> Tensor:
        given = {"frames": frames} if self.takes_clips else {}
        return torch.cat([self.network.decode(part.to(self.device), **given).float() for part in slices(z)])


def open_vae(
    spec: Mapping[str, Any],
    runs_root: Path,
    root: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Autoencoder:
    """The autoencoder that `{run: name}` (a run of ours, averaged weights of its newest checkpoint) or `{folder: path}` (diffusers'
    AutoencoderKL or AutoencoderKLCogVideoX) names.

    Args:
        runs_root: where runs lie.
        root: where a relative `folder` starts; the current folder without it.
        dtype: what it computes in; results are float32.
    Raises:
        UserError: neither or both, no such run or folder, a run without a checkpoint or without an autoencoder.
    """
    one_of(spec, "vae")
    if "folder" in spec:
        return _folder_vae((root or Path()) / str(spec["folder"]), device, dtype)
    run = RunFolder(runs_root / str(spec["run"]))
    return OwnAutoencoder(*trained_network(run, "autoencoder", "of a vae recipe"), device, dtype=dtype)


def _folder_vae(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    from nexus_scale.interop.autoencoder_kl import CLASS_NAME, AutoencoderKLFolder
    from nexus_scale.interop.published import family, named

    config = parsed_config(network_folder(folder, "vae"), CLASS_NAME)
    name = named("diffusers", "vae", config.get("_class_name")) if isinstance(config, dict) else None
    if name is None or config.get("_class_name") == CLASS_NAME:
        return AutoencoderKLFolder(folder, device=device, dtype=dtype)
    arguments, state = family(name).formats["diffusers"].read(folder)
    network = registry.find("models", name)(**arguments)
    network.load_state_dict(state)
    stated = stated_by(config, folder, network.latent_channels, family(name).scale)
    return OwnAutoencoder(network, name, arguments, device, stated, dtype)


def trained_network(run: RunFolder, what: str, which: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """The run's one trained network that serves as `what` (`contracts.Network.serves_as`), at its newest checkpoint, averaged where the
    recipe has an average; its registered name and its arguments."""
    from nexus_scale.engine.checkpoint import load_network, newest_of

    if not run.recipe.is_file():
        raise UserError(f"{run.path}: no run folder there (no recipe.yaml); train the {what} first", code=5)
    recipe = recipe_from(read_yaml(run.recipe), str(run.recipe))
    classes = {role: registry.find("models", network.name) for role, network in recipe.trained().items()}
    role = next((role for role, cls in classes.items() if cls.serves_as == what), None)
    if role is None:
        names = ", ".join(network.name for network in recipe.trained().values())
        raise UserError(f"{run.path}: a run of {names}, which is no {what}; name a run {which}", code=5)
    arguments = registry.check_arguments(classes[role], recipe.trained()[role].arguments, f"networks.{role}")
    network = classes[role](**arguments)
    checkpoint = newest_of(run)
    average = recipe.average_of(role) or role
    with torch.no_grad():
        load_network(checkpoint, average, network)
    return network, recipe.trained()[role].name, arguments


def one_of(spec: Mapping[str, Any], what: str) -> None:
    """That a spec names a `run` or a `folder`, and nothing else.

    Raises:
        UserError: an unknown key, neither or both.
    """
    valid = ["run", "folder"]
    for key in spec:
        if key not in valid:
            raise UserError(f"{what}: unknown key {key!r}; {registry.nearest(str(key), valid)}")
    if ("run" in spec) == ("folder" in spec):
        raise UserError(f"{what} {dict(spec)}: expected either `run` or `folder`")


def network_fingerprint(network: nn.Module, name: str, arguments: Mapping[str, Any]) -> str:
    """XXH3-128 over the family, its arguments and every tensor's name, type, shape and bytes, hexadecimal."""
    digest = xxhash.xxh3_128(json.dumps([name, dict(arguments)], sort_keys=True).encode())
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(f"\0{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
