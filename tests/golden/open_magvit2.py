"""What Open-MAGVIT2's video tokenizer computes: `python -m tests.golden.open_magvit2 FILE`, where FILE is
src/Open_MAGVIT2/modules/diffusionmodules/improved_video_model.py of github.com/TencentARC/SEED-Voken. It needs einops.

Writes open_magvit2.npz beside this file: what its encoder makes of a clip, what its decoder makes of latents, and the gradients of both, of
all parameters as their products with given vectors. Weights are functions of their names.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.golden.pythae import drawn, projected

FILE = Path(__file__).with_suffix(".npz")
CHANNELS, MULTIPLES, DEPTH, BITS = 32, (1, 2, 2), 1, 5
CLIP, LATENTS = (2, 3, 5, 8, 12), (2, BITS, 3, 2, 3)


def weight(name: str, shape: torch.Size) -> Tensor:
    """Normal numbers that their name decides, small where there are many."""
    return drawn(name, shape) / max(1, shape[1:].numel()) ** 0.5


def main(file: str) -> None:
    spec = importlib.util.spec_from_file_location("improved_video_model", file)
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    sizes = {
        "ch": CHANNELS,
        "out_ch": 3,
        "in_channels": 3,
        "num_res_blocks": DEPTH,
        "z_channels": BITS,
        "ch_mult": MULTIPLES,
    }
    found: dict[str, np.ndarray] = {}
    for side, cls, shape in (("encoder", theirs.Encoder, CLIP), ("decoder", theirs.Decoder, LATENTS)):
        network = cls(**sizes, resolution=8)
        for name, value in network.named_parameters():
            value.data = weight(f"{side}.{name}", value.shape)
        x = drawn(f"{side} input", shape).requires_grad_()
        y = network(x)
        (y * drawn(f"{side} onto", y.shape)).sum().backward()
        gradients = {f"{side}.{name}": value.grad for name, value in network.named_parameters()}
        found |= {side: y.detach().numpy(), f"{side}_slope": x.grad.numpy(), f"{side}_gradients": projected(gradients)}
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main(sys.argv[1])
