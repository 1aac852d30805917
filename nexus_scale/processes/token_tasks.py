"""Tokens of several media in one vocabulary, and tasks as data: what each is told and given, and what follows from that.

A sequence is

    none, task, [begin of what is given, its tokens] ..., begin of what is made, its tokens

of which everything before the tokens that are made, and the first of those that are shown, is the prefix. Numbers of the vocabulary: first
the special ones, of which task i is number i and what begins the s-th stream number `len(tasks) + s`; then each stream's codebooks in turn.
A number behind all of them stands where there is no token.

Source: Kondratyuk et al. 2023 (VideoPoet), sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_scale.config.registry import check_arguments, made
from nexus_scale.contracts import UserError

Count = Annotated[int, Field(ge=1, le=1 << 24)]
Shown = Annotated[int, Field(ge=0, le=1 << 20)]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Codes of one field: of `num_codebooks` books a step, (T, K), or (T,) of one.

    Attributes:
        codebook_size: of each book; 0 with `like`.
        frame_codes: steps that belong together, as the codes of a frame of a clip, by which tasks count what they show.
        like: the stream whose range of the vocabulary it shares.
    """

    codebook_size: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    num_codebooks: Annotated[int, Field(ge=1, le=64)] = 1
    frame_codes: Count = 1
    like: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a sequence is made of.

    Attributes:
        makes: the stream that is predicted.
        told: conditions that it is told; the others are dropped.
        given: streams that stand whole in the prefix.
        shows: how many frames of what is made are known beforehand, (fewest, most).
        weight: how often it is trained, in proportion.
    """

    makes: str
    told: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    shows: tuple[Shown, Shown] = (0, 0)
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0


class Laid(NamedTuple):
    """A task's sequence: `tokens` (B, S), `known` (B, S) bool, those of the prefix, `made` (B, S) bool, tokens that are to be predicted,
    and `begin`, the place of the first token of what is made."""

    tokens: Tensor
    known: Tensor
    made: Tensor
    begin: int

    def padded(self, steps: int, none: int) -> Laid:
        """With `steps` places."""
        more = (0, steps - self.tokens.shape[1])
        return Laid(F.pad(self.tokens, more, value=none), F.pad(self.known, more), F.pad(self.made, more), self.begin)


class Vocabulary:
    """Streams and tasks by name.

    Args:
        streams, tasks: settings of `Stream` and `Task`.
        num_special: numbers before the first stream's.
    Raises:
        UserError: names that are not there, or numbers that do not fit.
    """

    def __init__(
        self, streams: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]], num_special: int
    ):
        if not streams or not tasks:
            raise UserError(
                f"objective: got {len(streams)} streams and {len(tasks)} tasks; expected at least one of each"
            )
        self.streams: dict[str, Stream] = {name: _of(Stream, one, f"streams.{name}") for name, one in streams.items()}
        self.tasks: dict[str, Task] = {name: _of(Task, one, f"tasks.{name}") for name, one in tasks.items()}
        if num_special < len(streams) + len(tasks):
            raise UserError(
                f"objective.num_special: got {num_special}; {len(tasks)} tasks and {len(streams)} streams need {len(streams) + len(tasks)}"
            )
        self._first, size = {}, num_special
        for name, stream in self.streams.items():
            if not stream.like:
                if stream.codebook_size < 1:
                    raise UserError(f"objective.streams.{name}.codebook_size: got 0; expected at least 1, or `like`")
                self._first[name], size = size, size + stream.codebook_size * stream.num_codebooks
        self.size = size
        for name, stream in self.streams.items():
            if stream.like:
                if stream.like not in self._first:
                    raise UserError(
                        f"objective.streams.{name}.like: got {stream.like!r}; expected one of {sorted(self._first)}"
                    )
                self.streams[name] = self.streams[stream.like]
                self._first[name] = self._first[stream.like]
        for name, task in self.tasks.items():
            for stream_name in (task.makes, *task.given):
                if stream_name not in self.streams:
                    raise UserError(
                        f"objective.tasks.{name}: no stream {stream_name!r}; expected one of {sorted(self.streams)}"
                    )
            if task.shows[0] > task.shows[1]:
                raise UserError(f"objective.tasks.{name}.shows: got {list(task.shows)}; expected [fewest, most]")
        if not sum(task.weight for task in self.tasks.values()) > 0:
            raise UserError("objective.tasks: all weights are 0; expected one above it")
        self._numbers = {name: number for number, name in enumerate((*self.tasks, *self.streams))}

    @property
    def fields(self) -> tuple[str, ...]:
        """Streams that some task has."""
        return tuple(dict.fromkeys(name for task in self.tasks.values() for name in (task.makes, *task.given)))

    def range_of(self, name: str, step: int = 0) -> tuple[int, int]:
        """First number, and the one behind the last, of a stream's token at a step."""
        stream = self.streams[name]
        first = self._first[name] + step % stream.num_codebooks * stream.codebook_size
        return first, first + stream.codebook_size

    def tokens_of(self, name: str, codes: Tensor) -> Tensor:
        """Codes (B, T, K) -> their numbers in the vocabulary, (B, T K): a step's books one after another."""
        stream = self.streams[name]
        books = torch.arange(stream.num_codebooks, device=codes.device) * stream.codebook_size
        return (codes[..., : stream.num_codebooks] + (self._first[name] + books)).flatten(1)

    def codes_of(self, name: str, tokens: Tensor) -> Tensor:
        """The inverse of `tokens_of`: (B, T K) -> (B, T, K)."""
        stream = self.streams[name]
        books = torch.arange(stream.num_codebooks, device=tokens.device) * stream.codebook_size
        return tokens.unflatten(1, (-1, stream.num_codebooks)) - (self._first[name] + books)

    def lay(self, task: str, codes: Mapping[str, tuple[Tensor, Tensor]], shown: Tensor) -> Laid:
        """The sequence of a task.

        Args:
            codes: by stream, codes (B, T, K) and which of their steps are real, (B, T).
            shown: frames of what is made that are known, (B,).
        """
        of = self.tasks[task]
        parts, last = [], codes[of.makes]
        B, device = len(last[0]), last[0].device

        def special(number: int) -> Tensor:
            return torch.full((B, 1), number, dtype=torch.int64, device=device)

        parts += [special(self.size), special(self._numbers[task])]
        for name in of.given:
            parts += [special(self._numbers[name]), self._numbered(name, *codes[name])]
        parts.append(special(self._numbers[of.makes]))
        begin = sum(part.shape[1] for part in parts)
        tokens = torch.cat([*parts, self._numbered(of.makes, *last)], dim=1)
        stream = self.streams[of.makes]
        place = torch.arange(tokens.shape[1], device=device) - begin  # of a token among those that are made
        known = place < (shown * (stream.frame_codes * stream.num_codebooks))[:, None]
        return Laid(tokens, known, ~known & (tokens != self.size), begin)

    def _numbered(self, name: str, codes: Tensor, real: Tensor) -> Tensor:
        whole = real.repeat_interleave(self.streams[name].num_codebooks, dim=1)
        return torch.where(whole, self.tokens_of(name, codes), self.size)


def _of(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    where = f"objective.{where}"
    return made(kind, check_arguments(kind, dict(settings), where), where)
