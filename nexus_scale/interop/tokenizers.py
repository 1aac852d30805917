"""Frozen tokenizers of clips: runs of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.interop.autoencoders import network_fingerprint, one_of, trained_network
from nexus_scale.interop.slices import PLACES, slices


class OwnTokenizer:
    """A network of ours as a tokenizer of clips: one code for each place, frame by frame and row by row.

    Attributes:
        image_size: height and width of its clips.
        codebook_size: codes are below it.
        frame_codes: codes of a latent frame; the first of a clip is its first frame alone.
        fingerprint: what manifests of its codes carry.
    """

    def __init__(
        self, network: nn.Module, family: str, arguments: Mapping[str, Any], device: torch.device | str = "cpu"
    ):
        self.fingerprint = network_fingerprint(network, family, arguments)
        net: Any = network.eval().requires_grad_(False).to(device)
        self.network = net
        self.device = torch.device(device)
        self.image_size: tuple[int, int] = net.image_size
        self.codebook_size = int(net.codebook_size)
        _, height, width = net.code_shape(1, *self.image_size)
        self.frame_codes = height * width

    def check(self, shape: Sequence[int]) -> None:
        """Raises a UserError for a clip (3, F, H, W) that it cannot take; says what to change."""
        if tuple(shape[2:]) != self.image_size:
            raise UserError(
                f"got clips of {shape[2]} x {shape[3]}; the tokenizer was trained on {self.image_size[0]} x {self.image_size[1]}: make "
                "clips of that size"
            )
        self.network.check_sizes(*shape[1:])

    @torch.inference_mode()
    def encode(self, x: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1] -> codes (B, T) int64 on the CPU."""
        return torch.cat([self.network.encode(part.to(self.device)).flatten(1).cpu() for part in slices(x)])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T), or (B, T, 1) -> clips (B, 3, F, H, W), unbounded."""
        parts = codes.flatten(1).long().split(max(1, PLACES // codes.shape[1]))
        return torch.cat([self.network.decode(part.to(self.device)).float() for part in parts])


def open_tokenizer(
    spec: Mapping[str, Any], runs_root: Path, root: Path | None = None, device: torch.device | str = "cpu"
) -> OwnTokenizer:
    """The tokenizer that `{run: name}` names: a run of ours, averaged weights of its newest checkpoint.

    Raises:
        UserError: no such run, one without a checkpoint or without a tokenizer; a folder, of which none is known.
    """
    one_of(spec, "tokenizer")
    if "folder" in spec:
        raise UserError(f"tokenizer {dict(spec)}: no other program's tokenizers are read; expected {{run: NAME}}")
    run = RunFolder(runs_root / str(spec["run"]))
    return OwnTokenizer(*trained_network(run, "tokenizer", "of a magvit2 recipe"), device)
