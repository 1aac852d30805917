"""PixArt-alpha in diffusers (PixArtTransformer2DModel), as tables; to the bit. Its folders may call the class Transformer2DModel.

We fuse q, k, v of self-attention and k, v of cross-attention (rows in that order), which diffusers keeps apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Cond, ReadShard, UserError
from nexus_scale.interop.formats import Apart, Format, Key, Made, Patches, Table
from nexus_scale.interop.pipelines import Pipeline, TextSlot, Tuning, null_prompt
from nexus_scale.interop.published import Family, Readers, begins_alike
from nexus_scale.interop.schedulers import chain
from nexus_scale.models.diffusion.dit import EPS, FREQUENCIES
from nexus_scale.models.diffusion.pixart import LATENT_SIZE_512
from nexus_scale.models.layers.embeddings import sinusoid

MICRO_CONDITIONED_SIZE = 128
"""A config that does not say has sizes and aspect ratios as conditions where its sample_size is this."""

_BLOCKS: Table = {
    "table": "scale_shift_table",
    "proj": "attn1.to_out.0",
    "cross.q": "attn2.to_q",
    "cross.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "time_embed": "timestep_embedder",
    "size_embed": "resolution_embedder",
    "aspect_embed": "aspect_ratio_embedder",
}
_TABLE: Table = {
    "patch_embed": Patches("pos_embed.proj"),
    "text_embed.fc1": "caption_projection.linear_1",
    "text_embed.fc2": "caption_projection.linear_2",
    "mod.linear": "adaln_single.linear",
    "final.table": "scale_shift_table",
    "final.linear": "proj_out",
    **{f"{ours}.fc{n}": f"adaln_single.emb.{theirs}.linear_{n}" for ours, theirs in _EMBEDDERS.items() for n in (1, 2)},
    **{f"pixart_blocks.#.{ours}": f"transformer_blocks.#.{theirs}" for ours, theirs in _BLOCKS.items()},
    "pixart_blocks.#.qkv": Apart(tuple(f"transformer_blocks.#.attn1.{one}" for one in ("to_q", "to_k", "to_v"))),
    "pixart_blocks.#.cross.kv": Apart(tuple(f"transformer_blocks.#.attn2.{one}" for one in ("to_k", "to_v"))),
}


_SIZED = ("size_embed", "aspect_embed")


def _micro_conditions(config: Mapping[str, Any]) -> bool:
    stated = config["use_additional_conditions"]
    return config["sample_size"] == MICRO_CONDITIONED_SIZE if stated is None else bool(stated)


def _interpolation_scale(config: Mapping[str, Any]) -> float:
    stated = config["interpolation_scale"]
    return max(config["sample_size"] // LATENT_SIZE_512, 1) if stated is None else stated


DIFFUSERS = Format(
    "pixart",
    "PixArt weights",
    lambda net: {ours: row for ours, row in _TABLE.items() if net.micro_conditions or not ours.startswith(_SIZED)},
    "PixArtTransformer2DModel",
    config={
        "num_attention_heads": Key(16, "num_heads"),
        "attention_head_dim": Key(72, lambda net: net.hidden_size // net.num_heads),
        "in_channels": Key(4, "latent_channels"),
        "out_channels": Key(8, lambda net: net.out_channels),
        "num_layers": Key(28, "depth"),
        "cross_attention_dim": Key(1152, lambda net: net.hidden_size),
        "sample_size": Key(128, "latent_size"),
        "patch_size": Key(2, "patch_size"),
        "interpolation_scale": Key(None, lambda net: net.interpolation_scale),
        "use_additional_conditions": Key(None, lambda net: net.micro_conditions),
        "caption_channels": Key(None, "text_dim"),
    },
    constants={
        "dropout": 0.0,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "upcast_attention": False,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_type": "default",
    },
    none_means={"out_channels": "in_channels"},
    arguments={
        "hidden_size": lambda config: config["num_attention_heads"] * config["attention_head_dim"],
        "learn_sigma": lambda config: config["out_channels"] == 2 * config["in_channels"],
        "micro_conditions": _micro_conditions,
        "interpolation_scale": _interpolation_scale,
    },
    loose=("interpolation_scale", "use_additional_conditions"),
    fixed={"mlp_ratio": 4.0},
    # older folders store the table of positions
    computed=lambda net: {"pos_embed.pos_embed": Made(lambda net: torch.empty(0), written=False)},
    free=("latent_size", "interpolation_scale"),
    also=("Transformer2DModel",),
)


def scheduler_config(
    objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()
) -> dict[str, Any]:
    """The scheduler that steps as a recipe's sampler does; see `schedulers.chain`. The pipeline leaves out the variance that its network
    learned.

    Raises:
        UserError: the sampler draws with that variance, or diffusers has no such scheduler.
    """
    if sample.get("name", "ancestral") == "ancestral" and sample.get("variance", "learned") == "learned":
        raise UserError(
            "PixArtAlphaPipeline leaves the variance out that its network learned; this recipe has sample.variance learned: draw with "
            "dpm_multistep, or with variance small, large or none"
        )
    return chain({**objective, "variance": "fixed"}, sample, latents)


def _null_of(null: Cond, args: Mapping[str, Any]) -> dict[str, Tensor]:
    return null_prompt(null["text"], null.get("text_mask"), None)


# ------------------------------------------------------------------------------- the stages of training

CHOSEN_STEP = 500
"""The diffusion step at which a PixArt that begins with a DiT modulates as the DiT does without a class (the paper's choice)."""
_ALIKE = ("latent_channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "learn_sigma")


def _check_alike(ours: Any, theirs: Any, what: str, **needed: Any) -> None:
    """Raises a UserError where a network of other sizes is to begin with one."""
    for name, value in {**{name: getattr(ours, name) for name in _ALIKE}, **needed}.items():
        if (got := getattr(theirs, name)) != value:
            raise UserError(f"{what}: {name} is {got!r} there and {value!r} is needed; train it with {name}: {value}")


def _begin_with_dit(ours: Any, theirs: Any, read: ReadShard, what: str) -> Readers:
    """A PixArt that computes what a class-conditional DiT does without a class at CHOSEN_STEP, until its cross-attention has learned.

    Patches, attention and MLPs are taken over. The shared modulation is that of the DiT's first block, and time is embedded as there, with
    the embedding of no class added; each block's table is what its own modulation has beside the shared one at CHOSEN_STEP. Captions and
    cross-attention, which begins at zero, start fresh, and so do sizes. Classes are left behind.

    Source: the paper, section 2.3, "re-parameterization"; that the first block's modulation is the shared one is our choice.
    """
    _check_alike(ours, theirs, what, frequency_shift=0, mlp_norm_eps=EPS)
    shapes = {name: p.shape for name, p in theirs.named_parameters()}

    def whole(name: str) -> Tensor:
        return read(name, 0, shapes[name].numel()).view(shapes[name])

    @cache
    def no_class() -> Tensor:
        return whole("label_embed.table")[-1]

    @cache
    def embedded() -> Tensor:
        """The embedding of CHOSEN_STEP and no class, (D,)."""
        angles = sinusoid(torch.tensor([CHOSEN_STEP]), FREQUENCIES)
        inner = F.silu(F.linear(angles, whole("time_embed.fc1.weight"), whole("time_embed.fc1.bias")))
        return F.linear(inner, whole("time_embed.fc2.weight"), whole("time_embed.fc2.bias"))[0] + no_class()

    @cache
    def modulation(module: str) -> Tensor:
        """What a modulation gives for it, (parts * D,)."""
        return F.linear(F.silu(embedded()), whole(f"{module}.weight"), whole(f"{module}.bias"))

    def made(values: Callable[[], Tensor]) -> Callable[[int, int], Tensor]:
        return lambda start, stop: values().flatten()[start:stop]

    def beside_first(block: str) -> Tensor:
        return modulation(f"{block}.mod.linear") - modulation("dit_blocks.0.mod.linear")

    alike = {name: name.replace("pixart_blocks.", "dit_blocks.") for name, _ in ours.named_parameters()}
    alike |= {f"mod.linear.{kind}": f"dit_blocks.0.mod.linear.{kind}" for kind in ("weight", "bias")}
    found: dict[str, Callable[[int, int], Tensor]] = {
        name: partial(read, there) for name, there in alike.items() if there in shapes
    }
    found["time_embed.fc2.bias"] = made(lambda: whole("time_embed.fc2.bias") + no_class())
    found["final.table"] = made(lambda: modulation("final.mod.linear").view(2, -1) - embedded())
    for i in range(ours.depth):
        found[f"pixart_blocks.{i}.table"] = made(partial(beside_first, f"dit_blocks.{i}"))
    return found


def tuning_of(args: Mapping[str, Any]) -> Tuning:
    """Prompts are read without padding. Tokens, steps and scale are the defaults of diffusers' pipeline."""
    told = ("text", "original_size", "target_size") if args.get("micro_conditions") else ("text",)
    learns = {"name": "denoising", "times": "discrete", "null": "empty"}
    learns |= {"variance": "learned"} if args.get("learn_sigma") else {}
    return Tuning((None,), told, learns, {"steps": 20, "guidance": 4.5}, cut=120)


FAMILY = Family(
    {"diffusers": DIFFUSERS},
    tuning=tuning_of,
    pipeline=Pipeline(
        "PixArtAlphaPipeline",
        text=(TextSlot("text_encoder", "tokenizer", "T5EncoderModel"),),
        trained_on=("T5EncoderModel",),
        conditions=("text",),
        scheduler=scheduler_config,
        null_of=_null_of,
    ),
    begins_from={
        "dit": _begin_with_dit,
        # of other latents: positions are computed
        "pixart": begins_alike(_SIZED, may_differ=("latent_size", "interpolation_scale", "micro_conditions")),
    },
)
