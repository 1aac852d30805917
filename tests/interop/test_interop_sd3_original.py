"""MMDiT under the original release's key names: to the bit, and as diffusers' own converter reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nexus_scale.contracts import UserError
from nexus_scale.interop.layout import SafetensorsFiles, reader, to_theirs
from nexus_scale.interop.mmdit import DIFFUSERS, ORIGINAL
from nexus_scale.models.diffusion.mmdit import MMDiT
from tests.interop.test_flux_interop import assert_same

# heads are 64 wide and latent_size 128 as in every release, so that the shapes tell all arguments
SIZES: dict[str, Any] = {
    "latent_channels": 4,
    "patch_size": 2,
    "hidden_size": 128,
    "depth": 3,
    "num_heads": 2,
    "text_dim": 24,
    "pooled_dim": 20,
    "qk_norm": None,
    "dual_attention_blocks": 0,
    "pos_embed_max_size": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_blocks": 2, "pos_embed_max_size": 80},
}


def random_mmdit(args: dict[str, Any]) -> MMDiT:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = MMDiT(**args)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return net


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_and_as_diffusers_reads_them(case: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    args = SIZES | CASES[case]
    state = random_mmdit(args).state_dict()
    original = ORIGINAL.to_theirs(state, args)[1]
    assert all(key.startswith("model.diffusion_model.") for key in original)
    got, back = ORIGINAL.to_ours(None, original)
    assert got == args
    assert_same(back, state)
    assert_same(convert(dict(original)), DIFFUSERS.to_theirs(state, args)[1])

    beside = {"first_stage_model.x": torch.zeros(1), "text_encoders.y": torch.zeros(1)}
    save_file(original | beside, tmp_path / "with_encoders.safetensors")
    assert_same(ORIGINAL.read(tmp_path / "with_encoders.safetensors")[1], state)
    assert_same(ORIGINAL.read(ORIGINAL.write(tmp_path, state, args) / "sd3.safetensors")[1], state)


@pytest.mark.parametrize("case", CASES)
def test_the_layout_says_where_diffusers_has_each_value(case: str, tmp_path: Path) -> None:
    args = SIZES | CASES[case]
    net = random_mmdit(args)
    theirs = DIFFUSERS.to_theirs(net.state_dict(), args)[1]
    table = theirs.pop("pos_embed.pos_embed")
    layout = DIFFUSERS.layout(net)
    assert_same(to_theirs(layout, net.state_dict()), theirs)
    save_file(
        {n: t.contiguous() for n, t in (theirs | {"pos_embed.pos_embed": table}).items()}, tmp_path / "a.safetensors"
    )
    with SafetensorsFiles([tmp_path / "a.safetensors"], ignored=["pos_embed.pos_embed"]) as files:
        read = reader(layout, files, "SD3 weights")
        for name, p in net.state_dict().items():
            third = p.numel() // 3
            assert torch.equal(read(name, third, p.numel() - 1), p.flatten()[third:-1]), name


def test_others_are_refused() -> None:
    original = ORIGINAL.to_theirs(random_mmdit(SIZES).state_dict(), SIZES)[1]
    prefix = "model.diffusion_model."
    with pytest.raises(UserError, match="pos_embed is missing"):
        ORIGINAL.to_ours(None, {key: value for key, value in original.items() if not key.endswith("pos_embed")})
    with pytest.raises(UserError, match=r"qkv\.bias is missing"):
        ORIGINAL.to_ours(
            None, {k: v for k, v in original.items() if k != f"{prefix}joint_blocks.1.x_block.attn.qkv.bias"}
        )
    with pytest.raises(UserError, match="sin-cos"):
        ORIGINAL.to_ours(None, original | {f"{prefix}pos_embed": original[f"{prefix}pos_embed"] + 0.1})
    with pytest.raises(UserError, match="does not have"):
        ORIGINAL.to_ours(None, original | {f"{prefix}stranger": torch.zeros(1)})
    with pytest.raises(UserError, match="does not fit"):
        ORIGINAL.to_theirs({"nonsense": torch.zeros(1)}, SIZES)
