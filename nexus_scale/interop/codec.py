"""Codec in transformers (EncodecModel), as tables; to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Copy, Format, Key, Made, Row, Stacked, Table
from nexus_scale.interop.published import Family

OLD_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
"""Weight norm's names before torch 2.1, which published folders still have."""

_BOOK = "quantizer.layers.#.codebook."
_KERNELS = {"gain": OLD_NAMES["weight_g"], "direction": OLD_NAMES["weight_v"], "bias": "bias"}


EXAMPLE = """import torch
from transformers import EncodecModel

codec = EncodecModel.from_pretrained(folder, local_files_only=True)
waves = torch.zeros(1, codec.config.audio_channels, codec.config.sampling_rate)  # (B, C, T) in [-1, 1]
codes = codec.encode(waves, bandwidth=codec.config.target_bandwidths[-1]).audio_codes  # (1, B, K, T')
again = codec.decode(codes, [None]).audio_values
"""


def _table(net: Any) -> Table:
    """Their layers are numbered through, activations counted: an encoder's stage is its units and a convolution, a decoder's an
    activation, a convolution and its units."""
    units, stages = net.sizes.num_residual, len(net.sizes.strides)
    rows: dict[str, Row] = {
        "quantizer.codebooks": Stacked(f"{_BOOK}embed"),
        "quantizer.cluster_sum": Stacked(f"{_BOOK}embed_avg"),
        "quantizer.cluster_size": Stacked(f"{_BOOK}cluster_size"),
        "quantizer.initialised": "quantizer.layers.0.codebook.inited",
    }
    # by coder: the layer of its LSTM, of its first stage and of its last convolution; in a stage the first unit and the convolution
    places = {"encoder": (1 + stages * (units + 2), 1, 0, units + 1), "decoder": (1, 2, 2, 1)}
    for coder, (lstm, first, first_unit, resample) in places.items():
        out = first + stages * (units + 2) + (2 if coder == "encoder" else 1)
        rows |= {f"{coder}.lstm": f"{coder}.layers.{lstm}.lstm"}
        convolutions = {"conv_in": "0.conv", "conv_out": f"{out}.conv"}
        for stage in range(stages):
            begin = first + stage * (units + 2)
            convolutions[f"stages.{stage}.resample"] = f"{begin + resample}.conv"
            for unit in range(units):
                layer = begin + first_unit + unit
                for ours, theirs in (("conv1", "block.1"), ("conv2", "block.3"), ("shortcut", "shortcut")):
                    convolutions[f"stages.{stage}.units.{unit}.{ours}"] = f"{layer}.{theirs}.conv"
        rows |= {
            f"{coder}.{ours}.{parameter}": f"{coder}.layers.{theirs}.{name}"
            for ours, theirs in convolutions.items()
            for parameter, name in _KERNELS.items()
        }
    return rows


def _copies(net: Any) -> Mapping[str, Copy | Made]:
    differs = "some books are initialised and some are not; train it on first"
    return {
        f"quantizer.layers.{k}.codebook.inited": Copy("quantizer.initialised", differs)
        for k in range(1, net.num_codebooks)
    }


def _new_names(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm under its names of today."""
    parts = {name: name.rpartition(".") for name in state}
    return {
        f"{head}.{OLD_NAMES[tail]}" if tail in OLD_NAMES else name: state[name]
        for name, (head, _, tail) in parts.items()
    }


def num_books(bandwidth: float, config: Mapping[str, Any]) -> int:
    """Books that code at this bandwidth in kbit/s, as transformers counts them."""
    frame_rate = math.ceil(config["sampling_rate"] / math.prod(config["upsampling_ratios"]))
    return int(1000 * bandwidth // (frame_rate * math.ceil(math.log2(config["codebook_size"]))))


def _bandwidths(net: Any) -> list[float]:
    """1, 2, 4, ... books, and all: this list is what says how many there are. Half a bit a second is added where transformers would
    round their quotients down to one book less."""
    if net.codebook_size & (net.codebook_size - 1):
        raise UserError(f"EncodecModel has books of a power of 2 entries; got codebook_size {net.codebook_size}")
    sizes = {
        "sampling_rate": net.sample_rate_hz,
        "upsampling_ratios": net.sizes.strides,
        "codebook_size": net.codebook_size,
    }
    bits = math.ceil(net.sample_rate_hz / net.hop) * math.ceil(math.log2(net.codebook_size))
    counts = sorted({*(2**i for i in range(net.num_codebooks.bit_length())), net.num_codebooks})
    return [value if num_books(value := count * bits / 1000, sizes) == count else value + 0.0005 for count in counts]


def _processor(config: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    processor = {
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": config["audio_channels"],
        "sampling_rate": config["sampling_rate"],
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "chunk_length_s": None,
        "overlap": None,
    }
    return {"preprocessor_config.json": processor}


def _size(name: str) -> Any:
    return lambda net: getattr(net.sizes, name)


# our argument, where it is not of the network itself but of its sizes -> theirs, and what transformers assumes
_SIZES: dict[str, tuple[str, Any]] = {
    "base_channels": ("num_filters", 32),
    "kernel_size": ("kernel_size", 7),
    "last_kernel_size": ("last_kernel_size", 7),
    "residual_kernel_size": ("residual_kernel_size", 3),
    "num_residual": ("num_residual_layers", 1),
    "dilation_base": ("dilation_growth_rate", 2),
    "compress": ("compress", 2),
    "lstm_layers": ("num_lstm_layers", 2),
    "causal": ("use_causal_conv", True),
    "pad_mode": ("pad_mode", "reflect"),
}
TRANSFORMERS = Format(
    "codec",
    "EncodecModel weights",
    _table,
    "EncodecModel",
    config={
        "sampling_rate": Key(24000, "sample_rate_hz"),
        "audio_channels": Key(1, "audio_channels"),
        "codebook_size": Key(1024, "codebook_size"),
        "hidden_size": Key(128, _size("latent_channels")),
        "codebook_dim": Key(None, _size("latent_channels")),
        "upsampling_ratios": Key((8, 5, 4, 2), lambda net: list(reversed(net.sizes.strides))),
        "trim_right_ratio": Key(1.0, _size("trim_right")),
        "use_conv_shortcut": Key(True, lambda net: net.sizes.shortcut == "conv"),
        "target_bandwidths": Key((1.5, 3.0, 6.0, 12.0, 24.0), _bandwidths),
        **{theirs: Key(default, _size(ours)) for ours, (theirs, default) in _SIZES.items()},
    },
    # EnCodec's 24 and 32 kHz models; that of 48 kHz has norms over time
    constants={"norm_type": "weight_norm", "normalize": False, "chunk_length_s": None, "overlap": None},
    none_means={"codebook_dim": "hidden_size"},
    arguments={
        "latent_channels": lambda config: config["hidden_size"],
        "strides": lambda config: tuple(reversed(config["upsampling_ratios"])),
        "trim_right": lambda config: float(config["trim_right_ratio"]),
        "shortcut": lambda config: "conv" if config["use_conv_shortcut"] else "identity",
        "num_codebooks": lambda config: num_books(config["target_bandwidths"][-1], config),
        **{ours: itemgetter(theirs) for ours, (theirs, _) in _SIZES.items()},
    },
    loose=("target_bandwidths",),
    computed=_copies,
    variants=_new_names,
    file="model.safetensors",
    part="codec",
    model_type="encodec",
    beside=_processor,
    example=EXAMPLE,
)
FAMILY = Family({"transformers": TRANSFORMERS})
