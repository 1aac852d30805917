"""Codec weights <-> transformers' EncodecModel, in both directions and to the bit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.interop.folders import parsed_config, read_tensors, weight_files, write_json, write_tensors
from nexus_scale.models.audio.codec import Codec

CLASS_NAME = "EncodecModel"
WEIGHTS = "model.safetensors"

DEFAULTS: dict[str, Any] = {
    "target_bandwidths": (1.5, 3.0, 6.0, 12.0, 24.0),
    "sampling_rate": 24000,
    "audio_channels": 1,
    "normalize": False,
    "chunk_length_s": None,
    "hidden_size": 128,
    "num_filters": 32,
    "num_residual_layers": 1,
    "upsampling_ratios": (8, 5, 4, 2),
    "norm_type": "weight_norm",
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "use_causal_conv": True,
    "pad_mode": "reflect",
    "compress": 2,
    "num_lstm_layers": 2,
    "trim_right_ratio": 1.0,
    "codebook_size": 1024,
    "codebook_dim": None,
    "use_conv_shortcut": True,
}
"""What transformers assumes for keys that a config leaves out."""

OLD_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
"""Weight norm's names before torch 2.1, which published folders still have."""


def to_transformers(
    state: Mapping[str, Tensor], model_args: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config and state dict that EncodecModel takes.

    Args:
        state: state dict of a Codec.
        model_args: its constructor's arguments (defaults may be left out).
    Raises:
        UserError: what transformers' class cannot express; a state dict of another network.
    """
    net = _network(model_args)
    expected = net.state_dict()
    missing, extra = sorted(set(expected) - set(state))[:3], sorted(set(state) - set(expected))[:3]
    if missing or extra:
        raise UserError(f"the Codec state dict does not fit its arguments: missing {missing}, not expected {extra}")
    theirs = {}
    for name, tensor in state.items():
        if name.startswith("quantizer."):
            continue
        theirs[_their_name(name, net)] = tensor
    books = ("codebooks", "embed"), ("cluster_sum", "embed_avg"), ("cluster_size", "cluster_size")
    for k in range(net.num_codebooks):
        prefix = f"quantizer.layers.{k}.codebook."
        theirs[f"{prefix}inited"] = state["quantizer.initialised"].clone()
        for ours, name in books:
            theirs[prefix + name] = state[f"quantizer.{ours}"][k].clone()
    return _config(net), theirs


def from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_transformers`.

    Returns:
        model_args for `Codec(**model_args)`, and its state dict.
    Raises:
        UserError: a config or weights that are not EnCodec's, or of a kind that Codec does not have.
    """
    model_args = model_args_of(config)
    net = _network(model_args)
    left = {_new_name(name): tensor for name, tensor in state.items()}
    ours: dict[str, Tensor] = {}

    def take(key: str, shape: torch.Size) -> Tensor:
        if key not in left:
            raise UserError(
                f"{CLASS_NAME} weights: {key} is missing; the folder is incomplete or of another architecture"
            )
        tensor = left.pop(key)
        if tensor.shape != shape:
            raise UserError(
                f"{CLASS_NAME} weights: {key} has shape {tuple(tensor.shape)}, config.json says {tuple(shape)}"
            )
        return tensor

    for name, expected in net.state_dict().items():
        if not name.startswith("quantizer."):
            ours[name] = take(_their_name(name, net), expected.shape)
    layers = [f"quantizer.layers.{k}.codebook." for k in range(net.num_codebooks)]
    book, sizes = net.quantizer.codebooks[0].shape, net.quantizer.cluster_size[0].shape
    ours["quantizer.codebooks"] = torch.stack([take(f"{layer}embed", book) for layer in layers])
    ours["quantizer.cluster_sum"] = torch.stack([take(f"{layer}embed_avg", book) for layer in layers])
    ours["quantizer.cluster_size"] = torch.stack([take(f"{layer}cluster_size", sizes) for layer in layers])
    ours["quantizer.initialised"] = torch.stack([take(f"{layer}inited", torch.Size([1])) for layer in layers]).amin(0)
    if left:
        raise UserError(f"{CLASS_NAME} weights: {len(left)} tensors that it does not have, among them {min(left)}")
    return model_args, ours


def export_folder(state: Mapping[str, Tensor], model_args: Mapping[str, Any], folder: Path | str) -> Path:
    """Writes `config.json`, `preprocessor_config.json` and the weights, which `EncodecModel.from_pretrained(folder)` and
    `AutoProcessor.from_pretrained(folder)` load; returns the folder."""
    folder = Path(folder)
    config, tensors = to_transformers(state, model_args)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", config)
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
    write_json(folder / "preprocessor_config.json", processor)
    return folder


def export_trained(
    state: Mapping[str, Tensor],
    model_args: Mapping[str, Any],
    folder: Path | str,
    objective: Mapping[str, Any],
    sample: Mapping[str, Any],
) -> Path:
    """As `export_folder`, of a run's network; what its objective and sampler are plays no part."""
    return export_folder(state, model_args, folder)


EXPORTS = {"transformers": export_trained}


def import_folder(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that `EncodecModel.save_pretrained` wrote, or a published one.

    Returns:
        model_args, state dict of our Codec.
    Raises:
        UserError: no such folder, not safetensors, or another model.
    """
    folder = Path(folder)
    config = parsed_config(folder, CLASS_NAME)
    if not isinstance(config, dict) or config.get("model_type") != "encodec":
        got = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{folder / 'config.json'}: model_type is {got!r}; expected 'encodec'")
    return from_transformers(config, read_tensors(weight_files(folder, WEIGHTS)))


def model_args_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of `Codec` from an EncodecModel's config.

    Raises:
        UserError: a kind of EnCodec that Codec does not have, such as the 48 kHz one with its norms over time.
    """
    full = DEFAULTS | dict(config)
    for name, only in (
        ("norm_type", "weight_norm"),
        ("normalize", False),
        ("chunk_length_s", None),
    ):
        if full[name] != only:
            raise UserError(
                f"config.json: {name} is {full[name]!r}; Codec has only {only!r}, as EnCodec's 24 and 32 kHz models"
            )
    if full["codebook_dim"] not in (None, full["hidden_size"]):
        raise UserError(
            f"config.json: codebook_dim is {full['codebook_dim']}; Codec's entries are as large as its latents, "
            f"hidden_size {full['hidden_size']}"
        )
    return {
        "sample_rate_hz": full["sampling_rate"],
        "audio_channels": full["audio_channels"],
        "strides": tuple(reversed(full["upsampling_ratios"])),
        "base_channels": full["num_filters"],
        "latent_channels": full["hidden_size"],
        "kernel_size": full["kernel_size"],
        "last_kernel_size": full["last_kernel_size"],
        "residual_kernel_size": full["residual_kernel_size"],
        "num_residual": full["num_residual_layers"],
        "dilation_base": full["dilation_growth_rate"],
        "compress": full["compress"],
        "lstm_layers": full["num_lstm_layers"],
        "shortcut": "conv" if full["use_conv_shortcut"] else "identity",
        "causal": full["use_causal_conv"],
        "pad_mode": full["pad_mode"],
        "trim_right": float(full["trim_right_ratio"]),
        "num_codebooks": num_books(full["target_bandwidths"][-1], full),
        "codebook_size": full["codebook_size"],
    }


def num_books(bandwidth: float, config: Mapping[str, Any]) -> int:
    """Books that code at this bandwidth in kbit/s, as transformers counts them."""
    frame_rate = math.ceil(config["sampling_rate"] / math.prod(config["upsampling_ratios"]))
    return int(1000 * bandwidth // (frame_rate * math.ceil(math.log2(config["codebook_size"]))))


def _config(net: Codec) -> dict[str, Any]:
    sizes = net.sizes
    if net.codebook_size & (net.codebook_size - 1):
        raise UserError(f"{CLASS_NAME} has books of a power of 2 entries; got codebook_size {net.codebook_size}")
    config: dict[str, Any] = {
        "architectures": [CLASS_NAME],
        "model_type": "encodec",
        "torch_dtype": "float32",
        "normalize": False,
        "chunk_length_s": None,
        "overlap": None,
        "norm_type": "weight_norm",
        "sampling_rate": net.sample_rate_hz,
        "audio_channels": sizes.audio_channels,
        "hidden_size": sizes.latent_channels,
        "codebook_dim": sizes.latent_channels,
        "num_filters": sizes.base_channels,
        "num_residual_layers": sizes.num_residual,
        "upsampling_ratios": list(reversed(sizes.strides)),
        "kernel_size": sizes.kernel_size,
        "last_kernel_size": sizes.last_kernel_size,
        "residual_kernel_size": sizes.residual_kernel_size,
        "dilation_growth_rate": sizes.dilation_base,
        "use_causal_conv": sizes.causal,
        "pad_mode": sizes.pad_mode,
        "compress": sizes.compress,
        "num_lstm_layers": sizes.lstm_layers,
        "trim_right_ratio": sizes.trim_right,
        "use_conv_shortcut": sizes.shortcut == "conv",
        "codebook_size": net.codebook_size,
    }
    bits = math.ceil(net.sample_rate_hz / net.hop) * math.ceil(math.log2(net.codebook_size))
    # A list of bandwidths is what says how many books there are: 1, 2, 4, ... of them, and all. Half a bit a second is added,
    # because transformers rounds their quotients down.
    counts = sorted({*(2**i for i in range(net.num_codebooks.bit_length())), net.num_codebooks})
    config["target_bandwidths"] = [
        value if num_books(value := count * bits / 1000, config) == count else value + 0.0005 for count in counts
    ]
    return config


def _their_name(name: str, net: Codec) -> str:
    """Of one of our parameters outside of the books, transformers' name: their layers are numbered through, activations counted."""
    coder, rest = name.split(".", 1)
    units = net.sizes.num_residual
    per_stage, last = units + 2, len(net.sizes.strides)
    first = 1 if coder == "encoder" else 2  # the decoder's LSTM comes before its stages
    top = {
        "conv_in": 0,
        "lstm": 1 + last * per_stage if coder == "encoder" else 1,
        "conv_out": first + last * per_stage + (2 if coder == "encoder" else 1),
    }
    part, _, tail = rest.partition(".")
    if part == "lstm":
        return f"{coder}.layers.{top[part]}.lstm.{tail}"
    if part in top:
        return f"{coder}.layers.{top[part]}.conv.{_kernel_name(tail)}"
    match = re.fullmatch(r"stages\.(\d+)\.(?:resample|units\.(\d+)\.(conv1|conv2|shortcut))\.(\w+)", rest)
    assert match is not None, name
    stage, unit, conv, parameter = match.groups()
    begin = first + int(stage) * per_stage
    if unit is None:
        layer = begin + (units + 1 if coder == "encoder" else 1)
        return f"{coder}.layers.{layer}.conv.{_kernel_name(parameter)}"
    layer = begin + int(unit) + (0 if coder == "encoder" else 2)
    inner = {"conv1": "block.1", "conv2": "block.3", "shortcut": "shortcut"}[conv]
    return f"{coder}.layers.{layer}.{inner}.conv.{_kernel_name(parameter)}"


def _kernel_name(parameter: str) -> str:
    return {"gain": OLD_NAMES["weight_g"], "direction": OLD_NAMES["weight_v"]}.get(parameter, parameter)


def _new_name(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return f"{head}.{OLD_NAMES[tail]}" if tail in OLD_NAMES else name


def _network(model_args: Mapping[str, Any]) -> Codec:
    with torch.device("meta"):
        return Codec(**model_args)
