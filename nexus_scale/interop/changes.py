"""Low-rank changes of a network as other libraries store them: diffusers' and PEFT's files, and the flat names of kohya's scripts, made of
the original release's where those differ (`Family.kohya`).

Names and fused layers follow from the tables of the adapted family (`interop/formats.py`): rows of our layers are rows of theirs. Where
one of their layers is made of several of ours, or the other way about, and their changes differ, the ranks add up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.interop.folders import read_tensors, write_json, write_tensors
from nexus_scale.interop.formats import Format
from nexus_scale.interop.layout import Layout, of_now
from nexus_scale.interop.published import family

log = logging.getLogger(__name__)

DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
HEADER = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's settings in the file that has its tensors."""
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX, OF_TEXT = "lora_unet_", ("lora_te", "text_encoder")
TEXT = "text_encoder"
"""The first text encoder's name in a pipeline; the others' are text_encoder_2 and so on, in kohya's scripts lora_te1_, lora_te2_."""
HALVES = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_down.weight": "a", ".lora_up.weight": "b", ".lora.down.weight": "a",
    ".lora.up.weight": "b", ".lora_linear_layer.down.weight": "a", ".lora_linear_layer.up.weight": "b",
    ".alpha": "alpha", ".lora_magnitude_vector": "lengths", ".dora_scale": "lengths",
}  # fmt: skip
LAYOUTS = ("lora", "peft", "kohya")


class Change(NamedTuple):
    """B A, scale included: `a` (r, ...) and `b` (out, r), a layer's kernel flattened. Of DoRA also `lengths` (out,), of the changed
    weight's rows."""

    a: Tensor
    b: Tensor
    lengths: Tensor | None = None


def joined(parts: Sequence[tuple[Change | None, int]]) -> Change | None:
    """The change of rows put one after another, each the change and the number of rows; None where nothing changes."""
    there = [change for change, _ in parts if change is not None]
    if not there:
        return None
    first = there[0]
    lengths = [change.lengths for change in there if change.lengths is not None]
    if lengths and len(lengths) < len(parts):
        raise UserError("DoRA of a part of a layer that is fused elsewhere; the whole layer's lengths are needed")
    rows = torch.cat(lengths) if lengths else None
    if all(torch.equal(change.a, first.a) for change in there):
        empty = [torch.zeros(count, first.a.shape[0]) if change is None else change.b for change, count in parts]
        return Change(first.a, torch.cat(empty), rows)
    blocks = [torch.zeros(count, 0) if change is None else change.b for change, count in parts]
    return Change(torch.cat([change.a for change in there]), torch.block_diag(*blocks), rows)


def to_theirs(layout: Layout, ours: Mapping[str, Change]) -> dict[str, Change]:
    """Changes by the names of our layers -> by those of theirs."""
    found: dict[str, list[tuple[int, Change | None, int]]] = {}
    for name, parts in layout.items():
        change, at = ours.get(name.removesuffix(".weight")), 0
        for rows in parts:
            count = rows.stop - rows.start
            part = None if change is None else _rows(change, at, at + count)
            if name.endswith(".weight"):
                found.setdefault(_layer(rows.key), []).append((rows.start, part, count))
            at += count
    made = {}
    for key, placed in found.items():
        whole = joined([(part, count) for _, part, count in sorted(placed, key=lambda one: one[0])])
        if whole is not None:
            made[key] = whole
    return made


def to_ours(layout: Layout, theirs: Mapping[str, Change]) -> dict[str, Change]:
    """Changes by the names of their layers -> by those of ours."""
    made = {}
    for name, parts in layout.items():
        cut: list[tuple[Change | None, int]] = []
        for rows in parts if name.endswith(".weight") else ():
            change = theirs.get(_layer(rows.key))
            cut.append((change and _rows(change, rows.start, rows.stop), rows.stop - rows.start))
        whole = joined(cut)
        if whole is not None:
            made[name.removesuffix(".weight")] = whole
    return made


def _rows(change: Change, start: int, stop: int) -> Change:
    return Change(change.a, change.b[start:stop], None if change.lengths is None else change.lengths[start:stop])


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


# ------------------------------------------------------------------------------------------------- writing


def changes_of(adapter: Any) -> dict[str, Change]:
    """What a trained adapter (models/adapters/lora.py) adds to each layer."""
    found = {}
    for path, delta in adapter.deltas.items():
        a, b = delta.lora_A.detach().float().flatten(1), delta.lora_B.detach().float().flatten(1)
        found[path] = Change(a, b * delta.scale, delta.lengths(adapter.base.get_parameter(f"{path}.weight")))
    return found


class Changed(NamedTuple):
    """An adapter, the adapted network on any device and the format of its family, whose names are used; `part`: the network's folder in a
    pipeline."""

    form: Format
    net: nn.Module
    adapter: Any
    part: str

    def tensors(self, layout: str, alone: bool) -> dict[str, Tensor]:
        """By the names of a layout. `alone`: it is of the only text encoder of a pipeline."""
        rows = _kohya(self.form, self.net) if layout == "kohya" else self.form.layout(self.net)
        shapes = {_layer(part.key): part.shape for parts in rows.values() for part in parts}
        prefix = {"kohya": _kohya_prefix(self.part, alone), "peft": PEFT_PREFIX}.get(layout, f"{self.part}.")
        found: dict[str, Tensor] = {}
        for layer, change in to_theirs(rows, changes_of(self.adapter)).items():
            found |= _tensors(layout, prefix, layer, change, shapes[layer][1:])
        return found


def _kohya_prefix(part: str, alone: bool = True) -> str:
    """What names of a part's layers begin with."""
    if not part.startswith(TEXT):
        return KOHYA_PREFIX
    return "lora_te_" if alone else f"lora_te{part.removeprefix(TEXT).removeprefix('_') or 1}_"


def write_changes(
    folder: Path, layout: str, changed: Sequence[Changed], name: str = "adapter", *, one_text: bool = True
) -> Path:
    """Writes adapters as one file that `layout`'s libraries load: `lora` (diffusers' `load_lora_weights`), `peft` (a folder for
    `PeftModel`, for each of several one of its part's name), `kohya` (kohya's scripts, ComfyUI).

    Args:
        name: of kohya's file; the others have names that their libraries look for.
        one_text: the pipeline has one text encoder.
    Returns:
        The file; PEFT's first.
    """
    if layout == "peft" and len(changed) > 1:
        files = [write_changes(folder / one.part, layout, [one], name) for one in changed]
        return files[0]
    tensors: dict[str, Tensor] = {}
    for one in changed:
        tensors |= one.tensors(layout, one_text)
    file = folder / {"peft": PEFT_FILE, "kohya": f"{name}.safetensors"}.get(layout, DIFFUSERS_FILE)
    write_tensors(file, tensors)
    if layout == "peft":
        ranks = {
            layer.removesuffix(".lora_A.weight").removeprefix(PEFT_PREFIX): len(a)
            for layer, a in tensors.items()
            if "lora_A" in layer
        }
        most = max(ranks.values())
        write_json(
            folder / PEFT_CONFIG,
            {
                "peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": sorted(ranks), "bias": "none",
                "rank_pattern": {name: r for name, r in ranks.items() if r != most},
                "alpha_pattern": {name: r for name, r in ranks.items() if r != most},
                **({"use_dora": True} if any("magnitude" in name for name in tensors) else {}),
            },
        )  # fmt: skip
    return file


def _tensors(layout: str, prefix: str, layer: str, change: Change, kernel: Sequence[int]) -> dict[str, Tensor]:
    """A layer's change by the names of a layout, which begin with `prefix`."""
    a, b, lengths = change
    sides = [1 for _ in kernel[1:]]
    down, up = a.reshape(len(a), *kernel).clone(), b.reshape(*b.shape, *sides)
    if layout == "kohya":
        name = f"{prefix}{layer.replace('.', '_')}"
        found = {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(float(len(a))),
        }
        return found if lengths is None else found | {f"{name}.dora_scale": lengths.reshape(-1, 1, *sides)}
    name = f"{prefix}{layer}"
    found = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    if lengths is None:
        return found
    return found | {f"{name}.lora_magnitude_vector": lengths.reshape(1, -1, *sides) if sides else lengths}


def _kohya(form: Format, net: Any) -> Layout:
    """Where our tensors lie in what kohya's scripts call them by."""
    found = family(form.network).kohya(net)
    return form.layout(net) if found is None else found


# ------------------------------------------------------------------------------------------------- reading


def read_changes(path: Path, form: Format, net: nn.Module, part: str | None = None) -> dict[str, Change]:
    """The changes of our layers that a file, or a folder with one, holds, in any of the layouts.

    Args:
        part: of a pipeline, whose changes are read; that of the format unless given.
    Raises:
        UserError: no such file; keys that are no low-rank change of this network, among them those of other kinds of adapters.
    """
    file = _file_in(path)
    tensors = read_tensors([file])
    layout = _layout_in(tensors, form, net)
    layers = _layers(layout)
    flat = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, dict[str, Tensor]] = {}
    part, others = part or form.part, 0
    kohya = sorted({_kohya_prefix(part, alone=False), *((_kohya_prefix(part),) if part in (TEXT, form.part) else ())})
    for key, tensor in tensors.items():
        if _of_another(key, part):
            others += 1
            continue
        end = next((end for end in HALVES if key.endswith(end)), None)
        name = key[: -len(end)] if end else key
        bare = of_now(name.removeprefix(PEFT_PREFIX).removeprefix(f"{part}."), form.old_names)
        flattened = next((prefix for prefix in kohya if name.startswith(prefix)), None)
        layer = bare if flattened is None else flat.get(name.removeprefix(flattened))
        if end is None or layer not in layers:
            raise UserError(
                f"{file}: {key} is no low-rank change of {form.what}; expected LAYER.lora_A.weight and lora_B.weight (diffusers, PEFT) or "
                f"{kohya[0]}LAYER.lora_down.weight and lora_up.weight (kohya) of layers such as {min(layers)}"
            )
        found.setdefault(layer, {})[HALVES[end]] = tensor.float()
    if others:
        log.info("%s: %d of %d tensors are of other parts than %s", file, others, len(tensors), part)
    scale = _scales(path, file, form, part)
    theirs = {}
    for layer, halves in found.items():
        if "a" not in halves or "b" not in halves:
            raise UserError(f"{file}: {layer} has one of its two matrices alone; the file is incomplete")
        a, b = halves["a"].flatten(1), halves["b"].flatten(1)
        if b.shape[1] != len(a):
            raise UserError(f"{file}: {layer} has matrices of ranks {len(a)} and {b.shape[1]}; the file is damaged")
        alpha = halves.get("alpha")
        lengths = halves.get("lengths")
        factor = scale(layer, len(a)) if alpha is None else float(alpha) / len(a)
        theirs[layer] = Change(a, b * factor, None if lengths is None else lengths.flatten())
    return to_ours(layout, theirs)


def _of_another(key: str, part: str) -> bool:
    """Whether a tensor is of another part of the pipeline, by its name."""
    if not part.startswith(TEXT):
        return key.startswith(OF_TEXT)
    own = (PEFT_PREFIX, f"{part}.", _kohya_prefix(part, alone=False), *(("lora_te_",) if part == TEXT else ()))
    return not key.startswith(own)


def _layers(layout: Layout) -> set[str]:
    return {_layer(rows.key) for parts in layout.values() for rows in parts if rows.key.endswith(".weight")}


def _layout_in(tensors: Mapping[str, Tensor], form: Format, net: Any) -> Layout:
    """The layout by whose names a file's layers are called: diffusers', unless kohya's are others and the file has those alone."""
    own, other = form.layout(net), _kohya(form, net)
    flat = {name.partition(".")[0].removeprefix(KOHYA_PREFIX) for name in tensors if name.startswith(KOHYA_PREFIX)}
    known = {layer.replace(".", "_") for layer in _layers(own)}
    others = {layer.replace(".", "_") for layer in _layers(other)}
    return other if len(flat & others) > len(flat & known) else own


def _file_in(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    alone = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(alone) == 1:
        return alone[0]
    raise UserError(f"{path}: no such file, and no folder with {DIFFUSERS_FILE}, {PEFT_FILE} or one file alone")


def _scales(path: Path, file: Path, form: Format, part: str) -> Any:
    """`scale(layer, rank)` as diffusers says in the file's header, or PEFT in a configuration beside it; 1 where neither does.

    Raises:
        UserError: settings that cannot be read, or of another kind of adapter.
    """
    config = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    with safe_open(file, framework="pt") as opened:
        header = (opened.metadata() or {}).get(HEADER)
    if header is None and not config.is_file():
        return lambda layer, rank: 1.0
    where = config if header is None else file
    try:
        said = json.loads(config.read_text(encoding="utf-8") if header is None else header)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    values = {key.removeprefix(f"{part}."): value for key, value in said.items()}
    if values.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{where}: peft_type {values.get('peft_type')}; expected LORA")
    if "lora_alpha" not in values:
        raise UserError(f"{where}: says no lora_alpha of {form.what}, by which its changes are scaled")

    def scale(layer: str, rank: int) -> float:
        alphas = values.get("alpha_pattern") or {}
        own = next((alphas[end] for end in alphas if layer == end or layer.endswith(f".{end}")), values["lora_alpha"])
        return float(own) / (rank**0.5 if values.get("use_rslora") else rank)

    return scale


def fill_from(path: Path, form: Format, adapter: Any, part: str | None = None) -> ReadShard:
    """Reads an adapter's parameters from a file of another library. Layers that the file leaves alone start fresh: it raises KeyError.
    `part`: see `read_changes`.

    Raises:
        UserError: as `read_changes`; a layer that the adapter does not have, or another rank than its own.
    """
    found = read_changes(path, form, adapter.base, part)
    values: dict[str, Tensor] = {}
    for layer, (a, b, lengths) in found.items():
        delta = adapter.deltas.get(layer)
        if delta is None:
            raise UserError(f"{path}: changes {layer}, which the adapter does not; add it to `layers`")
        if len(a) != delta.rank:
            raise UserError(
                f"{path}: {layer} has rank {len(a)} there and {delta.rank} in the recipe; set rank, or `ranks: {{{layer}: {len(a)}}}`"
            )
        values[f"{layer}.lora_A"], values[f"{layer}.lora_B"] = a, b / delta.scale
        if lengths is not None:
            weight = adapter.base.get_parameter(f"{layer}.weight")
            if delta.magnitude is None or weight.is_meta:
                raise UserError(
                    f"{path}: {layer} has lengths of its own (DoRA), which are not read without the weights that they are of; begin with "
                    "a run of yours (init_from: {format: run})"
                )
            values[f"{layer}.magnitude"] = lengths / weight.detach().float().flatten(1).norm(dim=1)
    return lambda name, start, stop: values[name].flatten()[start:stop]
