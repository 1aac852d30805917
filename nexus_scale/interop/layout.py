"""Where each of our parameters lies in another library's checkpoint: as data, so that both directions follow from one table.

Libraries cut the same weights differently: q, k and v apart or fused, halves swapped, a kernel with two dimensions more. All of
that is rows of their tensors put one after another; the rest is names. A layout that is data also reads in pieces: a rank takes
its part of each tensor from the file, and no process ever holds the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.engine.tensor_file import TensorFile


class Rows(NamedTuple):
    """Rows [start, stop) of their tensor `key`, which has `shape`."""

    key: str
    start: int
    stop: int
    shape: tuple[int, ...]


Layout = Mapping[str, tuple[Rows, ...]]
"""By name of our parameter, the rows of theirs that make it up, in order. No row of theirs is used twice."""


def whole(key: str, shape: Sequence[int]) -> tuple[Rows, ...]:
    """One to one; `shape` is theirs, of as many values as ours and in the same order."""
    return (Rows(key, 0, shape[0] if len(shape) else 1, tuple(shape)),)


def apart(keys: Sequence[str], counts: Sequence[int], rest: Sequence[int]) -> tuple[Rows, ...]:
    """Our fused tensor is theirs one after another: `counts` rows each, of shape `rest`."""
    return tuple(Rows(key, 0, n, (n, *rest)) for key, n in zip(keys, counts, strict=True))


def swapped(key: str, shape: Sequence[int]) -> tuple[Rows, ...]:
    """Our first half is their second: (shift, scale) <-> (scale, shift)."""
    half = shape[0] // 2
    return Rows(key, half, shape[0], tuple(shape)), Rows(key, 0, half, tuple(shape))


def to_theirs(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors -> theirs. Tensors that are taken over whole share their memory; rows of theirs that no layout names are zero."""
    placed: dict[str, list[tuple[Rows, Tensor]]] = {}
    for name, parts in layout.items():
        counts = [rows.stop - rows.start for rows in parts]
        cut = state[name].reshape(sum(counts), -1).split(counts)
        for rows, tensor in zip(parts, cut, strict=True):
            placed.setdefault(rows.key, []).append((rows, tensor))
    theirs = {}
    for key, found in placed.items():
        found.sort(key=lambda pair: pair[0].start)
        shape, tensors = found[0][0].shape, [tensor for _, tensor in found]
        if missing := shape[0] - sum(map(len, tensors)):
            tensors.append(tensors[0].new_zeros(missing, tensors[0].shape[1]))
        theirs[key] = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(shape)
    return theirs


def to_ours(
    layout: Layout, state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], what: str
) -> dict[str, Tensor]:
    """Their tensors -> ours.

    Args:
        shapes: of our parameters.
        what: how errors call their checkpoint.
    Raises:
        UserError: a tensor is missing, of another shape, or one too many.
    """
    check_tensors(layout, {key: tuple(tensor.shape) for key, tensor in state.items()}, what)
    ours = {}
    for name, parts in layout.items():
        tensors = [state[rows.key][rows.start : rows.stop] for rows in parts]
        ours[name] = (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).reshape(tuple(shapes[name]))
    return ours


def check_tensors(layout: Layout, got: Mapping[str, tuple[int, ...]], what: str) -> None:
    """That a checkpoint with tensors of these shapes is of this layout.

    Raises:
        UserError: a tensor is missing, of another shape, or one too many.
    """
    expected = {rows.key: rows.shape for parts in layout.values() for rows in parts}
    for key, shape in expected.items():
        if key not in got:
            raise UserError(f"{what}: {key} is missing; the checkpoint is incomplete or of another architecture")
        if got[key] != shape:
            raise UserError(f"{what}: {key} has shape {got[key]}; these sizes of the network make it {shape}")
    if extra := sorted(set(got) - set(expected)):
        raise UserError(
            f"{what}: {len(extra)} tensors that the network does not have, among them {extra[0]}; it is of another architecture"
        )


class SafetensorsFiles:
    """The tensors of one or more safetensors files, read in slices; a context, in which the files are open.

    Args:
        files: paths; the files of a sharded checkpoint.
        prefix: of keys; where some have it, only they count, without it: a single file may carry an autoencoder and text
            encoders beside the network.
        ignored: keys (without the prefix) that are not the network's weights, such as a table of positions that we compute; one that ends
            with a dot stands for all that begin with it, another network in the same files.
        renamed: parts of keys that older files have, with what stands there now.
    Raises:
        UserError: a file that is not safetensors, a key in two files.
    """

    def __init__(
        self,
        files: Iterable[Path],
        *,
        prefix: str = "",
        ignored: Sequence[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        self._stack = ExitStack()
        self._place: dict[str, tuple[Any, TensorFile, str]] = {}
        with self._stack:
            for file in files:
                try:
                    opened = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                    ranges = TensorFile.open(Path(file))
                except (OSError, ValueError, KeyError, SafetensorError) as error:
                    raise UserError(f"{file}: not a readable safetensors file ({error})") from None
                for key in opened.keys():  # noqa: SIM118 (a handle, not a mapping)
                    if key in self._place:
                        raise UserError(f"{file}: {key} is in another file of this checkpoint too; remove one")
                    self._place[key] = opened, ranges, key
            if inside := {key: place for key, place in self._place.items() if prefix and key.startswith(prefix)}:
                self._place = {key.removeprefix(prefix): place for key, place in inside.items()}
            named = {of_now(key, renamed): place for key, place in self._place.items()}
            self._place = {key: place for key, place in named.items() if not left_out(key, ignored)}
            self._stack = self._stack.pop_all()

    def __enter__(self) -> SafetensorsFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(handle.get_slice(stored).get_shape()) for key, (handle, _, stored) in self._place.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of them, whole."""
        return {key: handle.get_tensor(stored) for key, (handle, _, stored) in self._place.items()}

    def values(self, key: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of the flattened tensor, and only they, by reading their bytes: a mapped file would count as memory of
        every process that looks at it."""
        _, ranges, stored = self._place[key]
        found = torch.empty(stop - start, dtype=ranges.places[stored][0])
        ranges.read_into(stored, start, found)
        return found


class TorchFile(SafetensorsFiles):
    """The tensors of one file that `torch.save` wrote, read as weights alone: no code of it runs.

    Raises:
        UserError: not such a file, or one of other things than named tensors.
    """

    def __init__(
        self,
        file: Path,
        *,
        prefix: str = "",
        ignored: Sequence[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        if not file.is_file():
            raise UserError(f"{file}: no such file; give the path of the weights, absolute or below the data root")
        try:
            held = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the reader's own among them
            raise UserError(f"{file}: not a readable file of torch's tensors ({str(error).splitlines()[0]})") from None
        if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
            raise UserError(f"{file}: holds {type(held).__name__}; expected tensors by name: save a state_dict()")
        super().__init__([])
        inside = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
        named = {of_now(key, renamed): value for key, value in (inside or held).items()}
        self._held = {key: value for key, value in named.items() if not left_out(key, ignored)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in self._held.items()}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._held)

    def values(self, key: str, start: int, stop: int) -> Tensor:
        return self._held[key].flatten()[start:stop]


def opened_files(
    files: Sequence[Path],
    *,
    prefix: str = "",
    ignored: Sequence[str] = (),
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> SafetensorsFiles:
    """Safetensors files, or one of `torch.save` (.pth, .pt), by its name."""
    if len(files) == 1 and files[0].suffix in (".pth", ".pt"):
        return TorchFile(files[0], prefix=prefix, ignored=ignored, renamed=renamed)
    return SafetensorsFiles(files, prefix=prefix, ignored=ignored, renamed=renamed)


def left_out(key: str, ignored: Sequence[str]) -> bool:
    """Whether a tensor is among those that are ignored, by its name or by what it begins with."""
    return key in ignored or key.startswith(tuple(name for name in ignored if name.endswith(".")))


def of_now(key: str, renamed: Mapping[str, str]) -> str:
    """The name that a tensor has now."""
    for old, new in renamed.items():
        key = key.replace(old, new)
    return key


def reader(layout: Layout, files: SafetensorsFiles, what: str) -> ReadShard:
    """`read(name, start, stop)`: values [start, stop) of our flattened parameter, float32, on the CPU.

    Nothing else of the files is read.
    Raises:
        UserError: the files do not hold this layout; before anything is read.
    """
    check_tensors(layout, files.shapes(), what)

    def read(name: str, start: int, stop: int) -> Tensor:
        found = torch.empty(stop - start, dtype=torch.float32)
        begin = 0  # of the part, in our flattened tensor
        for key, first, last, shape in layout[name]:
            width = math.prod(shape[1:])
            end = begin + (last - first) * width
            low, high = max(start, begin), min(stop, end)
            if low < high:
                there = first * width - begin
                found[low - start : high - start] = files.values(key, there + low, there + high)
            begin = end
        if stop > begin:
            raise ValueError(f"{name}: values up to {stop} asked for, of {begin}")
        return found

    return read
