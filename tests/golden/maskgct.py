"""What Amphion's MaskGCT_S2A hides of codes, shows of them and asks for: `python -m tests.golden.maskgct FOLDER`.

FOLDER is a checkout of open-mmlab/Amphion. Its Llama is stood in for by a sum, einops is not used. Writes maskgct.npz beside this file.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".npz")
B, T, K, V, D = 5, 9, 4, 7, 6
CASES = range(6)
"""Seeds of cases; among them are all levels, and one without a prompt."""


class Sum(nn.Module):
    """In the place of their transformer: frames and what is told, added up."""

    def __init__(self, **_: object):
        super().__init__()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        return x + cond


def stand_ins(folder: str) -> None:
    sys.modules["einops"] = types.SimpleNamespace(rearrange=None)  # type: ignore[assignment]
    sys.modules["models.tts.maskgct.llama_nar"] = types.SimpleNamespace(DiffLlama=Sum)  # type: ignore[assignment]
    sys.path.insert(0, folder)


def made(folder: str) -> dict[str, np.ndarray]:
    stand_ins(folder)
    from models.tts.maskgct.maskgct_s2a import MaskGCT_S2A  # type: ignore[import-not-found]

    torch.manual_seed(0)
    net = MaskGCT_S2A(num_quantizer=K, hidden_size=D, num_layers=1, num_heads=1, codebook_size=V, cfg_scale=0.3)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x0, real = torch.randint(0, V, (B, T, K)), torch.arange(T) < torch.tensor([[9], [8], [9], [7], [9]])
    cond = torch.randn(B, T, D)
    found: dict[str, Tensor] = {
        "x0": x0, "real": real, "cond": cond, "mask_emb": net.mask_emb.weight, "layer_emb": net.layer_emb.weight,
        "token_emb": torch.stack([one.weight for one in net.token_emb]),
        "head": torch.stack([one.weight for one in net.to_logits]),
        "bias": torch.stack([one.bias for one in net.to_logits]),
    }  # fmt: skip
    for case in CASES:
        torch.manual_seed(case)
        t = torch.rand(B)
        logits, layer, mask, _, prompt, share = net.loss_t(x0, real.float(), t, cond)
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), x0[..., int(layer)], reduction="none")  # (B, T)
        loss = (nats * mask[..., 0]).sum() / mask.sum()  # as their trainer has it
        [slope] = torch.autograd.grad(loss, [net.mask_emb.weight])
        values = {"t": t, "layer": layer, "mask": mask[..., 0], "prompt": prompt, "share": share, "logits": logits,
                  "loss": loss, "slope": slope}  # fmt: skip
        found |= {f"{case}/{name}": value for name, value in values.items()}
    return {name: value.detach().numpy() for name, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(FILE, **made(sys.argv[1]))  # type: ignore[arg-type]
