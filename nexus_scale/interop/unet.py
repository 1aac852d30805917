"""UNet in diffusers (UNet2DModel, DDPMPipeline), as tables; to the bit. We fuse q, k, v (rows in that order), which diffusers does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop import schedulers
from nexus_scale.interop.autoencoder_kl import OLD_NAMES
from nexus_scale.interop.formats import Apart, Format, Key, Pointwise, Row, State, Table, hashed
from nexus_scale.interop.pipelines import Pipeline
from nexus_scale.interop.published import Family, begins_alike

RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "embed": "time_emb_proj",
    "shortcut": "conv_shortcut",
}
PLACES: Mapping[str, Row] = {
    "norm": "group_norm",
    "qkv": Apart(("to_q", "to_k", "to_v")),
    "proj": "to_out.0",
}
ENDS: Table = {
    "conv_in": "conv_in",
    "time_embed.fc1": "time_embedding.linear_1",
    "time_embed.fc2": "time_embedding.linear_2",
    "class_embed.table": "class_embedding.weight",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}


def within(ours: str, theirs: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of a part, by whole names."""

    def whole(row: Row) -> Row:
        if isinstance(row, Apart):
            return Apart(tuple(f"{theirs}.{part}" for part in row.names))
        return Pointwise(f"{theirs}.{row.name}") if isinstance(row, Pointwise) else f"{theirs}.{row}"

    return {f"{ours}.{name}": whole(row) for name, row in rows.items()}


def levels(attention: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of all levels, whose stages have this attention."""
    places = {"down.#": "down_blocks.#", "middle": "mid_block", "up.#": "up_blocks.#"}
    found: dict[str, Row] = {}
    for ours, theirs in places.items():
        found |= within(f"levels.{ours}.stages.#.resnet", f"{theirs}.resnets.#", RESNET)
        found |= within(f"levels.{ours}.stages.#.attention", f"{theirs}.attentions.#", attention)
    for ours, theirs in {"down.#": "down_blocks.#.downsamplers", "up.#": "up_blocks.#.upsamplers"}.items():
        found |= within(f"levels.{ours}.resample", f"{theirs}.0", {**RESNET, "conv": "conv"})
    return found


def used(rows: Mapping[str, Row], net: Any) -> dict[str, Row]:
    """Those rows that the network has tensors for."""
    names = [hashed(name) for name in net.state_dict()]
    there = {*names, *(name.rpartition(".")[0] for name in names)}
    return {name: row for name, row in rows.items() if name in there}


def latent_size(config: Mapping[str, Any]) -> int:
    """`sample_size`: a number, [height, width] that are equal, or null, of any size."""
    size = config["sample_size"]
    if isinstance(size, Sequence) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int | None):
        raise ValueError(f"sample_size is {size!r}; expected a number, or one side twice")
    return 32 if size is None else size


def time_dim(config: Mapping[str, Any]) -> int:
    """`time_embedding_dim`, where null four times the first width."""
    return int(config["time_embedding_dim"] or 4 * config["block_out_channels"][0])


def _kind(down: bool, attends: bool, net: Any) -> str:
    way = "Down" if down else "Up"
    if attends:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if net.resnet_resample else f"{way}Block2D"


def _types(down: bool) -> Any:
    def of(net: Any) -> list[str]:
        kinds = [_kind(down, level in net.attention, net) for level in range(len(net.widths))]
        return kinds if down else kinds[::-1]

    return of


def _attention(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Levels with attention, the same on both ways. The last level changes no resolution, so that either name of it may stand there."""
    kinds = {way: [str(kind) for kind in config[f"{way.lower()}_block_types"]] for way in ("Down", "Up")}
    for way, found in kinds.items():
        if set(found) - {f"{way}Block2D", f"Attn{way}Block2D", f"Resnet{way}sampleBlock2D"}:
            raise ValueError(f"{way.lower()}_block_types has a kind that is not of UNet")
    down, up = ([kind.startswith("Attn") for kind in found] for found in kinds.values())
    if down != up[::-1] or len(down) != len(config["block_out_channels"]):
        raise ValueError("down_block_types, up_block_types and block_out_channels do not mirror each other")
    return tuple(level for level, attends in enumerate(down) if attends)


def _mid_groups(net: Any) -> int | None:
    if net.scale_shift:
        return net.num_groups if net.mid_attention_norm else None
    if not net.mid_attention_norm:
        raise UserError(
            "UNet2DModel without scale_shift has a norm before the middle's attention; got mid_attention_norm false"
        )
    return None


def _mid_norm(config: Mapping[str, Any]) -> bool:
    groups = config["attn_norm_num_groups"]
    if groups not in (None, config["norm_num_groups"]):
        raise ValueError(f"attn_norm_num_groups is {groups!r}; expected null or norm_num_groups")
    return groups is not None or config["resnet_time_scale_shift"] == "default"


def _same_resampling(config: Mapping[str, Any]) -> bool:
    """Whether residual blocks change the resolution everywhere; raises a ValueError where some do."""
    kinds = {"conv": False, "resnet": True}
    last = len(config["down_block_types"]) - 1
    found = {
        *(kinds[config[key]] for key in ("downsample_type", "upsample_type") if _attention(config)),
        *(kind.startswith("Resnet") for kind in config["down_block_types"][:last] if not kind.startswith("Attn")),
        *(kind.startswith("Resnet") for kind in config["up_block_types"][:last] if not kind.startswith("Attn")),
    }
    if len(found) > 1:
        raise ValueError("some levels change the resolution by a residual block and some by a convolution")
    return found == {True}


def _table(net: Any) -> Table:
    return used({**ENDS, **levels(PLACES)}, net)


def _by_noise(state: State, args: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    """The network as it is, which ConsistencyModelPipeline tells 250 log sigma."""
    if args.get("counts_steps", True):
        raise UserError(
            "ConsistencyModelPipeline tells the network its level of noise; this one counts DDPM's steps: train it with counts_steps: false"
        )
    return state, dict(args)


DIFFUSERS = Format(
    "unet",
    "UNet weights",
    _table,
    "UNet2DModel",
    config={
        "sample_size": Key(None, lambda net: net.latent_size),
        "in_channels": Key(3, "latent_channels"),
        "out_channels": Key(3, lambda net: net.out_channels),
        "time_embedding_dim": Key(None, lambda net: net.time_dim),
        "freq_shift": Key(0, "frequency_shift", (0, 1)),
        "flip_sin_to_cos": Key(True, lambda net: not net.sin_first, (False, True)),
        "down_block_types": Key(("DownBlock2D", *["AttnDownBlock2D"] * 3), _types(True)),
        "up_block_types": Key((*["AttnUpBlock2D"] * 3, "UpBlock2D"), _types(False)),
        "block_out_channels": Key((224, 448, 672, 896), "widths"),
        "layers_per_block": Key(2, "depth"),
        "downsample_padding": Key(1, "downsample_padding", (0, 1)),
        "downsample_type": Key("conv", lambda net: "resnet" if net.resnet_resample else "conv", ("conv", "resnet")),
        "upsample_type": Key("conv", lambda net: "resnet" if net.resnet_resample else "conv", ("conv", "resnet")),
        "dropout": Key(0.0, "dropout"),
        "attention_head_dim": Key(8, "head_dim"),
        "norm_num_groups": Key(32, "num_groups"),
        "attn_norm_num_groups": Key(None, _mid_groups),
        "norm_eps": Key(1e-5, "norm_eps"),
        "resnet_time_scale_shift": Key(
            "default", lambda net: "scale_shift" if net.scale_shift else "default", ("default", "scale_shift")
        ),
        "add_attention": Key(True, "mid_attention", (False, True)),
        "num_class_embeds": Key(None, lambda net: net.num_classes or None),
    },
    constants={
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "mid_block_type": "UNetMidBlock2D",
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "class_embed_type": None,
        "num_train_timesteps": None,
    },
    arguments={
        "latent_size": latent_size,
        "learn_sigma": lambda config: config["out_channels"] == 2 * config["in_channels"],
        "time_dim": time_dim,
        "sin_first": lambda config: not config["flip_sin_to_cos"],
        "attention": _attention,
        "resnet_resample": _same_resampling,
        "scale_shift": lambda config: config["resnet_time_scale_shift"] == "scale_shift",
        "mid_attention_norm": _mid_norm,
        "num_classes": lambda config: config["num_class_embeds"] or 0,
    },
    # checked by the arguments that they make
    loose=(
        "sample_size", "time_embedding_dim", "attn_norm_num_groups", "downsample_type", "upsample_type", "down_block_types",
        "up_block_types",
    ),
    free=("latent_size", "dropout"),
    old_names=OLD_NAMES,
    part="unet",
)  # fmt: skip


def pipeline_of(args: Mapping[str, Any]) -> Pipeline:
    """DDPMPipeline, with a scheduler that counts as the network was told to."""
    scheduler = schedulers.counted(schedulers.of_noise_alone, bool(args.get("counts_steps", True)))
    return Pipeline("DDPMPipeline", scheduler=scheduler, part="unet", decodes=False, conditional=False)


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    pipeline=pipeline_of,
    pipelines={
        "consistency": Pipeline(
            "ConsistencyModelPipeline", scheduler=schedulers.consistency, part="unet", decodes=False, prepared=_by_noise
        )
    },
    begins_from={"unet": begins_alike(may_differ=DIFFUSERS.free)},
)
