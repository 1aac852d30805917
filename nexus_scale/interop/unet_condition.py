"""UNetCondition in diffusers (UNet2DConditionModel), as tables; to the bit.

We fuse q, k, v of self-attention and k, v of cross-attention (rows in that order), which diffusers keeps apart. Its `attention_head_dim` is
the number of heads (huggingface/diffusers#2011): so it is `num_heads` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nexus_scale.contracts import SIZES, Cond, UserError
from nexus_scale.interop.formats import Apart, Format, Key, Pointwise, Row, Table
from nexus_scale.interop.layout import Layout, Rows
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning, null_prompt
from nexus_scale.interop.published import Family, begins_alike
from nexus_scale.interop.schedulers import chain, counted
from nexus_scale.interop.unet import ENDS, latent_size, levels, time_dim, used
from nexus_scale.models.layers.text import compose_text

NUM_SIZES = 6
"""Numbers that SDXL is told beside the pooled text; a config has the sum of both alone."""
MIDDLES = {"transformer": "UNetMidBlock2DCrossAttn", "resnet": "UNetMidBlock2D", "none": None}

_LAYER = "layers.#."
_THEIRS = "transformer_blocks.#."


def _transformer(net: Any) -> dict[str, Row]:
    """Rows of a stage's transformer."""
    around = {"proj_in": "proj_in", "proj_out": "proj_out"}
    return {
        "norm": "norm",
        **(around if net.linear_projection else {ours: Pointwise(theirs) for ours, theirs in around.items()}),
        **{f"{_LAYER}{norm}": f"{_THEIRS}{norm}" for norm in ("norm1", "norm2", "norm3")},
        f"{_LAYER}attn1.qkv": Apart(tuple(f"{_THEIRS}attn1.{part}" for part in ("to_q", "to_k", "to_v"))),
        **{f"{_LAYER}{attn}.q": f"{_THEIRS}{attn}.to_q" for attn in ("attn1", "attn2")},
        **{
            f"{_LAYER}{attn}.kv": Apart((f"{_THEIRS}{attn}.to_k", f"{_THEIRS}{attn}.to_v"))
            for attn in ("attn1", "attn2")
        },
        **{f"{_LAYER}{attn}.proj": f"{_THEIRS}{attn}.to_out.0" for attn in ("attn1", "attn2")},
        f"{_LAYER}mlp.fc1": f"{_THEIRS}ff.net.0.proj",
        f"{_LAYER}mlp.fc2": f"{_THEIRS}ff.net.2",
    }


def _table(net: Any) -> Table:
    own = {
        "guide_embed": "time_embedding.cond_proj",
        "pooled_embed.fc1": "add_embedding.linear_1",
        "pooled_embed.fc2": "add_embedding.linear_2",
        "text_embed": "encoder_hid_proj",
    }
    return used({**ENDS, **own, **levels(_transformer(net))}, net)


# ------------------------------------------------------------------------------------------------ their config


def _each(config: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    """A setting that is one for all levels or one for each, as one for each."""
    value, count = config[key], len(config["block_out_channels"])
    if not isinstance(value, list | tuple):
        return (value,) * count
    if len(value) != count or any(isinstance(one, list | tuple) for one in value):
        raise ValueError(f"{key} is {value!r}; expected a number, or one for each of {count} levels")
    return tuple(value)


def _short(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else list(values)


def _attends(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Levels with a transformer, the same on both ways."""
    kinds = {way: [str(kind) for kind in config[f"{way.lower()}_block_types"]] for way in ("Down", "Up")}
    for way, found in kinds.items():
        if set(found) - {f"{way}Block2D", f"CrossAttn{way}Block2D"}:
            raise ValueError(f"{way.lower()}_block_types has a kind that is not of UNetCondition")
    down, up = ([kind.startswith("Cross") for kind in found] for found in kinds.values())
    if down != up[::-1] or len(down) != len(config["block_out_channels"]):
        raise ValueError("down_block_types, up_block_types and block_out_channels do not mirror each other")
    return tuple(down)


def _types(down: bool) -> Any:
    def of(net: Any) -> list[str]:
        way = "Down" if down else "Up"
        kinds = [f"{'CrossAttn' * bool(layers)}{way}Block2D" for layers in net.transformer_depth]
        return kinds if down else kinds[::-1]

    return of


def _layers(net: Any) -> Any:
    """Layers of each level's transformers; the last number is the middle's, too."""
    *front, last = (layers or 1 for layers in net.transformer_depth)
    if net.middle == "transformer":
        if net.transformer_depth[-1] not in (0, net.middle_depth):
            raise UserError(
                f"UNet2DConditionModel's middle has as many layers as its last level ({last}); got middle_depth {net.middle_depth}"
            )
        last = net.middle_depth
    return _short((*front, last))


def _only_cross(config: Mapping[str, Any]) -> tuple[int, ...]:
    attends = _attends(config)
    return tuple(level for level, only in enumerate(_each(config, "only_cross_attention")) if only and attends[level])


def _middle(config: Mapping[str, Any]) -> str:
    return next(name for name, theirs in MIDDLES.items() if theirs == config["mid_block_type"])


def _latent_channels(config: Mapping[str, Any]) -> int:
    given, out = config["in_channels"], config["out_channels"]
    return int(given if out == 2 * given else out)


def _pooled_dim(config: Mapping[str, Any]) -> int:
    if config["addition_embed_type"] is None:
        return 0
    pooled = config["projection_class_embeddings_input_dim"] - NUM_SIZES * config["addition_time_embed_dim"]
    if pooled < 1:
        raise ValueError("projection_class_embeddings_input_dim leaves no room for a pooled text beside the sizes")
    return int(pooled)


DIFFUSERS = Format(
    "unet_condition",
    "UNet weights",
    _table,
    "UNet2DConditionModel",
    config={
        "sample_size": Key(None, lambda net: net.latent_size),
        "in_channels": Key(4, lambda net: net.latent_channels + net.beside_channels),
        "out_channels": Key(4, lambda net: net.out_channels),
        "flip_sin_to_cos": Key(True, lambda net: not net.sin_first, (False, True)),
        "freq_shift": Key(0, "frequency_shift", (0, 1)),
        "down_block_types": Key((*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"), _types(True)),
        "mid_block_type": Key(MIDDLES["transformer"], lambda net: MIDDLES[net.middle], tuple(MIDDLES.values())),
        "up_block_types": Key(("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), _types(False)),
        "only_cross_attention": Key(
            False, lambda net: _short([level in net.only_cross for level in range(len(net.widths))])
        ),
        "block_out_channels": Key((320, 640, 1280, 1280), "widths"),
        "layers_per_block": Key(2, lambda net: _short(net.depth)),
        "downsample_padding": Key(1, "downsample_padding", (0, 1)),
        "dropout": Key(0.0, "dropout"),
        "norm_num_groups": Key(32, "num_groups"),
        "norm_eps": Key(1e-5, "norm_eps"),
        "cross_attention_dim": Key(1280, lambda net: net.text_dim),
        "transformer_layers_per_block": Key(1, _layers),
        "encoder_hid_dim": Key(None, lambda net: net.text_features or None),
        "encoder_hid_dim_type": Key(None, lambda net: "text_proj" if net.text_features else None, (None, "text_proj")),
        "attention_head_dim": Key(8, lambda net: _short(net.num_heads)),
        "use_linear_projection": Key(False, "linear_projection", (False, True)),
        "addition_embed_type": Key(None, lambda net: "text_time" if net.pooled_dim else None, (None, "text_time")),
        "addition_time_embed_dim": Key(None, lambda net: net.size_frequencies if net.pooled_dim else None),
        "num_class_embeds": Key(None, lambda net: net.num_classes or None),
        "upcast_attention": Key(False, "upcast_attention", (False, True)),
        "resnet_time_scale_shift": Key(
            "default", lambda net: "scale_shift" if net.scale_shift else "default", ("default", "scale_shift")
        ),
        "time_embedding_dim": Key(None, lambda net: net.time_dim),
        "time_cond_proj_dim": Key(None, lambda net: net.guidance_dim or None),
        "projection_class_embeddings_input_dim": Key(
            None, lambda net: net.pooled_dim + net.num_sizes * net.size_frequencies if net.pooled_dim else None
        ),
        "mid_block_only_cross_attention": Key(None, lambda net: None, (None, False, True)),
    },
    constants={
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "reverse_transformer_layers_per_block": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "cross_attention_norm": None,
    },
    arguments={
        "latent_size": latent_size,
        "latent_channels": _latent_channels,
        "beside_channels": lambda config: config["in_channels"] - _latent_channels(config),
        "learn_sigma": lambda config: config["out_channels"] == 2 * config["in_channels"],
        "sin_first": lambda config: not config["flip_sin_to_cos"],
        "transformer_depth": lambda config: tuple(
            layers * attends
            for layers, attends in zip(_each(config, "transformer_layers_per_block"), _attends(config), strict=True)
        ),
        "middle": _middle,
        "middle_depth": lambda config: _each(config, "transformer_layers_per_block")[-1],
        "only_cross": _only_cross,
        "depth": lambda config: _each(config, "layers_per_block"),
        "num_heads": lambda config: _each(config, "attention_head_dim"),
        "text_dim": lambda config: {*_each(config, "cross_attention_dim")}.pop(),
        "text_features": lambda config: config["encoder_hid_dim"] or 0,
        "pooled_dim": _pooled_dim,
        "size_frequencies": lambda config: config["addition_time_embed_dim"] or 256,
        "num_classes": lambda config: config["num_class_embeds"] or 0,
        "scale_shift": lambda config: config["resnet_time_scale_shift"] == "scale_shift",
        "time_dim": time_dim,
        "guidance_dim": lambda config: config["time_cond_proj_dim"] or 0,
    },
    # all that the arguments hold, in one spelling of several
    loose=(
        "sample_size", "only_cross_attention", "layers_per_block", "attention_head_dim", "transformer_layers_per_block",
        "time_embedding_dim", "mid_block_only_cross_attention", "addition_time_embed_dim",
    ),
    free=("latent_size", "dropout", "pooled_dim", "num_sizes", "upcast_attention"),
    part="unet",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ their pipelines

INPAINTING = 1
"""Channels beside the latents and those of what a mask leaves: the mask's."""
CLIP = TextSlot("text_encoder", "tokenizer", "CLIPTextModel")
SECOND = TextSlot("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection")
NO_CHECKER = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def _null_of(null: Cond, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The unconditional text of one encoder, or of SDXL's two."""
    if args.get("pooled_dim"):
        return null_prompt(*compose_text(null, DIFFUSERS.network_of(args).text_dim))
    return null_prompt(null["text"], null.get("text_mask"), None)


def _class_name(args: Mapping[str, Any]) -> str:
    """The pipeline of a network: Stable Diffusion's or XL's, into a picture where it is given one, or of few steps (LCM)."""
    xl = "XL" if args.get("pooled_dim") else ""
    beside, latents = args.get("beside_channels", 0), DIFFUSERS.network_of(args).latent_channels
    if beside == latents + INPAINTING:
        return f"StableDiffusion{xl}InpaintPipeline"
    if beside == latents:
        return f"StableDiffusion{xl}InstructPix2PixPipeline"
    if args.get("guidance_dim") and not xl:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{xl}Pipeline"


def pipeline_of(args: Mapping[str, Any]) -> Pipeline:
    """diffusers' pipeline for a network of these arguments."""
    xl = bool(args.get("pooled_dim"))
    left_out = {"image_encoder": [None, None]}
    return Pipeline(
        _class_name(args),
        text=(CLIP, SECOND) if xl else (CLIP,),
        trained_on=(CLIP.class_name, SECOND.class_name) if xl else (CLIP.class_name,),
        conditions=("text", "text_2", "pooled_2") if xl else ("text",),
        scheduler=counted(chain, bool(args.get("counts_steps", True))),
        null_of=_null_of,
        part="unet",
        settings={**left_out, "feature_extractor": [None, None]} if xl else {**left_out, **NO_CHECKER},
    )


def tuning_of(args: Mapping[str, Any]) -> Tuning | None:
    """Of Stable Diffusion, and of XL, whose pipeline guides away from zeros (`force_zeros_for_empty_prompt`). Steps and scale are the
    defaults of diffusers' pipelines. A network that is told more than prompts has another objective."""
    learns = {"name": "denoising", "times": "discrete"}
    if args.get("beside_channels") or args.get("guidance_dim"):
        return None
    if args.get("pooled_dim"):
        told = ("text", "text_2", "pooled_2", *SIZES)
        return Tuning((0, 0), told, {**learns, "null": "zeros"}, {"steps": 50, "guidance": 5.0})
    return Tuning((0,), ("text",), {**learns, "null": "empty"}, {"steps": 50, "guidance": 7.5}, states="last")


_INNER = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_ORIGINAL_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def original_names(net: Any) -> dict[str, str]:
    """Modules of diffusers by what the original release calls them, whose blocks stand in one row on the way down and one on the way up."""
    config = DIFFUSERS.config_of(net)
    levels_down = list(zip(_each(config, "layers_per_block"), _attends(config), strict=True))
    names, place = dict(_ORIGINAL_ENDS), 1
    for level, (depth, _) in enumerate(levels_down):
        for number in range(depth):
            names[f"down_blocks.{level}.resnets.{number}"] = f"input_blocks.{place}.0"
            names[f"down_blocks.{level}.attentions.{number}"] = f"input_blocks.{place}.1"
            place += 1
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
        place += 1
    names |= {f"mid_block.resnets.{number}": f"middle_block.{2 * number}" for number in (0, 1)}
    names["mid_block.attentions.0"] = "middle_block.1"
    place = 0
    for level, (depth, attends) in enumerate(reversed(levels_down)):
        for number in range(depth + 1):
            names[f"up_blocks.{level}.resnets.{number}"] = f"output_blocks.{place}.0"
            names[f"up_blocks.{level}.attentions.{number}"] = f"output_blocks.{place}.1"
            place += 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{1 + attends}.conv"
    residual = {name: original for name, original in names.items() if ".resnets." in name}
    inner = {f"{name}.{part}": f"{it}.{other}" for name, it in residual.items() for part, other in _INNER.items()}
    return {**names, **inner}


def kohya_layout(net: Any) -> Layout | None:
    """XL's tensors by their names in the original release; version 1's and 2's have diffusers'."""
    if not net.pooled_dim:
        return None
    names = original_names(net)

    def renamed(rows: Rows) -> Rows:
        parts = rows.key.split(".")
        for count in range(len(parts), 0, -1):
            if (module := ".".join(parts[:count])) in names:
                return rows._replace(key=".".join([names[module], *parts[count:]]))
        return rows

    return {name: tuple(map(renamed, parts)) for name, parts in DIFFUSERS.layout(net).items()}


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    pipeline=pipeline_of,
    kohya=kohya_layout,
    tuning=tuning_of,
    # a student that is told a guidance scale begins with a teacher that is not, and inpainting with a network of latents alone
    begins_from={
        "unet_condition": begins_alike(
            fresh=("guide_embed.",),
            may_differ=(*DIFFUSERS.free, "beside_channels", "guidance_dim", "sizes", "linear_projection"),
            wider=("conv_in.weight",),
        )
    },
)
