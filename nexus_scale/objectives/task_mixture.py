"""Next-token prediction over several media in one vocabulary, of many tasks at once: each sample of a batch is one of them.

Source: Kondratyuk et al. 2023 (VideoPoet), section 3: a prefix of what is told, given and shown, which is seen both ways, and one loss over
what is made.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    Nets,
    Phase,
    Request,
    Rng,
    TokenSampler,
    UserError,
    Word,
    on_both,
)
from nexus_scale.objectives.autoregressive import Autoregressive, Canvas, Read, Walk
from nexus_scale.objectives.conditions import drop_condition
from nexus_scale.objectives.token_scores import score_codes
from nexus_scale.processes.token_tasks import Laid, Vocabulary

GOLDEN = (math.sqrt(5) - 1) / 2


class TaskMixture(Autoregressive):
    """One network, `model(tokens, cond) -> logits`, as for `autoregressive` with one stream of `Vocabulary.size` tokens, and `prefix` in
    `cond`. Each sample's task is drawn, and how much of what is made it is shown.

    The loss is the mean over samples of the mean over the tokens that a sample's task makes. Draws: `drop`, `task`, `shows`.
    """

    def __init__(
        self,
        *,
        streams: dict[str, dict[str, Any]],
        tasks: dict[str, dict[str, Any]],
        makes: str = "video_codes",
        num_special: int = 256,
        conditions: tuple[str, ...] = ("text",),
        condition_drop: float | dict[str, Annotated[float, Field(ge=0, le=1)]] = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        alternates: bool = False,
    ):
        """
        Args:
            streams: codes by batch field: `codebook_size`, `num_codebooks`, `frame_codes`, or the stream that it is `like`.
            tasks: by name: what it `makes` (that which is drawn, unless it says otherwise), which conditions it is `told`, which streams it
                is `given`, how many frames of what it makes it `shows`, and its `weight`.
            makes: the stream that `nexus sample` draws.
            num_special: numbers of the vocabulary before the streams'; VideoPoet has 256.
            conditions: what the network is told, batch fields; `<name>_mask` goes along.
            condition_drop: probability that a sample loses all of them, so that guidance has something to start from; by name, each is lost
                independently.
            label_smoothing, z_loss: see `TokenLoss`.
            alternates: all samples of a step are of one task, so that none is padded to the longest task's length; tasks take turns by
                their weights, as phases of their names. VideoPoet's alternating gradient descent, section 3.3.
        """
        self.vocabulary = Vocabulary(
            streams, {name: {"makes": makes, **task} for name, task in tasks.items()}, num_special
        )
        if makes not in self.vocabulary.streams:
            raise UserError(f"objective.makes: got {makes!r}; expected one of {sorted(self.vocabulary.streams)}")
        super().__init__(
            field=makes,
            num_codebooks=1,
            codebook_size=self.vocabulary.size,
            pattern="parallel",
            conditions=conditions,
            condition_drop=condition_drop,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        self.makes, self.alternates = makes, alternates
        for name, task in self.vocabulary.tasks.items():
            if unknown := sorted(set(task.told) - set(conditions)):
                raise UserError(f"objective.tasks.{name}.told: got {unknown}; expected some of {list(conditions)}")
        weights = torch.tensor([task.weight for task in self.vocabulary.tasks.values()], dtype=torch.float64)
        self._up_to = (weights.cumsum(0) / weights.sum()).tolist()

    @property
    def fields(self) -> Sequence[str]:
        return (*self.vocabulary.fields, *self.conditions)

    def phases(self, step: int) -> Sequence[Phase]:
        if not self.alternates:
            return super().phases(step)
        # multiples of the golden ratio fall evenly: after any number of steps each task has had its share, to within a step or two
        number = bisect_right(self._up_to[:-1], (step + 1) * GOLDEN % 1)
        return [Phase(list(self.vocabulary.tasks)[number], trains="model")]

    # -------------------------------------------------------------------------------------- a batch's parts

    def streams(self, batch: Mapping[str, Tensor] | Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """By stream the batch's codes, (B, T, K), and which steps are real, (B, T)."""
        found = {}
        for name in self.vocabulary.fields:
            if name in batch:
                codes = batch[name]
                codes = codes[..., None] if codes.ndim == 2 else codes
                if codes.shape[2] < self.vocabulary.streams[name].num_codebooks:
                    raise ValueError(
                        f"{name}: got codes {tuple(codes.shape)}; objective.streams.{name}.num_codebooks is "
                        f"{self.vocabulary.streams[name].num_codebooks}"
                    )
                mask = f"{name}_mask"
                real = batch[mask] if mask in batch else torch.ones_like(codes[..., 0], dtype=torch.bool)
                found[name] = codes.long(), real
        return found

    def _each(self, batch: Batch, u: Tensor) -> list[Laid]:
        """The sequences of all tasks, of one length; u (B,) in [0, 1) says how much is shown."""
        laid = [self._of_task(name, batch, u) for name in self.vocabulary.tasks]
        steps = max(one.tokens.shape[1] for one in laid)
        return [one.padded(steps, self.codebook_size) for one in laid]

    def _of_task(self, name: str, batch: Batch, u: Tensor) -> Laid:
        fewest, most = self.vocabulary.tasks[name].shows
        return self.vocabulary.lay(name, self.streams(batch), fewest + (u * (most + 1 - fewest)).long())

    @staticmethod
    def _read(tokens: Tensor, known: Tensor, made: Tensor) -> Read:
        """Sequences (B, S) as the network reads them."""
        return Read(tokens[:, :-1, None], tokens[:, 1:, None], made[:, 1:, None], known[:, :-1])

    def _only_told(self, cond: Cond, task: Tensor) -> dict[str, Tensor]:
        """Conditions without those that each sample's task, (B,), is not told."""
        away = {}
        for name in self.conditions:
            untold = [number for number, one in enumerate(self.vocabulary.tasks.values()) if name not in one.told]
            if untold:
                away[name] = on_both(lambda task, of=tuple(untold): _among(task, of), task)
        if "label" in away and "drop" in cond:
            away["label"] = away["label"] | cond["drop"]
        return drop_condition(cond, away) if away else dict(cond)

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Cross-entropy in nats a token. Metrics: see `TokenLoss`."""
        u = rng.uniform("shows")
        if self.alternates:
            laid = self._of_task(phase, batch, u)
            task = torch.full_like(u, list(self.vocabulary.tasks).index(phase), dtype=torch.int64)
            read = self._read(laid.tokens, laid.known, laid.made)
        else:
            task = on_both(self._drawn, rng.uniform("task"))
            read = self._mixed(self._each(batch, u), task)
        cond = self._only_told(self.condition_drop(self.condition(batch), rng), task)
        logits = self._logits(nets, read, cond)
        return self.token_loss(logits.flatten(1, 2), read.targets.flatten(1, 2), read.wanted.flatten(1, 2))

    def _mixed(self, laid: Sequence[Laid], task: Tensor) -> Read:
        """Each sample's own of the tasks, (B,)."""
        rows = torch.arange(len(task), device=task.device)

        def own(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts)[task, rows]

        return self._read(
            own([one.tokens for one in laid]), own([one.known for one in laid]), own([one.made for one in laid])
        )

    def _drawn(self, u: Tensor) -> Tensor:
        """Tasks, (B,), from u (B,) in [0, 1)."""
        return (
            torch.stack([u >= bound for bound in self._up_to[:-1]]).sum(0) if len(self._up_to) > 1 else (u < 0).long()
        )

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """Every task, under its conditions and shown the fewest.

        Returns:
            `loss`, nats a token, the mean over tasks by their weights; `loss_<task>`; `loss_zero`, of one who knows nothing but the task;
            `accuracy`; each (B,) float32.
        """
        tasks, u = self.vocabulary.tasks, rng.uniform("shows") * 0
        shares = torch.tensor(self._up_to).diff(prepend=torch.zeros(1)).tolist()
        found: dict[str, Tensor] = {name: u.float() for name in ("loss", "loss_zero", "accuracy")}
        for number, (laid, name) in enumerate(zip(self._each(batch, u), tasks, strict=True)):
            read = self._read(laid.tokens, laid.known, laid.made)
            cond = self._only_told(self.condition(batch), torch.full_like(u, number, dtype=torch.int64))
            scored = score_codes(
                self._logits(nets, read, cond).flatten(1, 2), read.targets.flatten(1, 2), read.wanted.flatten(1, 2)
            )
            zero = math.log(self.vocabulary.streams[tasks[name].makes].codebook_size)
            for key, value in (("loss", scored.loss), ("loss_zero", zero), ("accuracy", scored.accuracy)):
                found[key] = found[key] + shares[number] * value
            found[f"loss_{name}"] = scored.loss
        return found

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        takes: set[Word] = {"sampler"}
        if self.conditions:
            takes |= {"prompt", "guidance", "negative"}
        made = [task for task in self.vocabulary.tasks.values() if task.makes == self.makes]
        if any(task.shows[1] and not task.given for task in made):
            takes |= {"begin", "image"}
        if any(task.given == (f"masked_{self.makes}",) for task in made):
            takes |= {"begin", "mask"}
        if any(task.given == (f"outline_{self.makes}",) for task in made):
            takes |= {"control"}
        return Draws(
            self.makes,
            takes=frozenset(takes),
            conditions=self.conditions,
            walks="logits",
            drops=self.condition_drop.drops,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """Samples as long as the batch's, of the task that is told and given nothing else."""
        return self.condition(batch), replace(request, shape=tuple(batch[self.makes].shape[1:]))

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Codes of what is made, (B, T), or (B, T, K) of several books: as many steps as `request.shape` says.

        Args:
            cond: the conditions.
            request: `given` decides the task: what it has whole is given, and of the stream that is made the first frames are shown, which
                come back as the samples' own. Without any, the first task that is given nothing and shown nothing.
        Raises:
            UserError: there is no such task.
        """
        sampler: TokenSampler = self.sampler_of(request)
        B, device = len(rng.positions), rng.uniform("begin").device
        name, shown = self._task_of(request)
        makes = self.vocabulary.tasks[name].makes
        stream = self.vocabulary.streams[makes]
        streams = self.streams(request.given)
        codes = torch.zeros(B, request.shape[0], stream.num_codebooks, dtype=torch.int64, device=device)
        if shown:
            codes[:, : shown * stream.frame_codes] = streams[makes][0][:, : shown * stream.frame_codes]
        streams[makes] = codes, torch.ones_like(codes[..., 0], dtype=torch.bool)
        laid = self.vocabulary.lay(name, streams, torch.full((B,), shown, device=device))
        steps = laid.tokens.shape[1]
        canvas = Canvas(laid.tokens[..., None], laid.made[..., None], torch.full((B,), steps, device=device), steps)
        number = torch.full((B,), list(self.vocabulary.tasks).index(name), device=device)
        told = self.told(self._only_told(cond, number), request)
        walk = Walk(nets["model"], canvas, told, end=None, both_ways=True)

        def logits(drawn: Tensor | None) -> Tensor:
            found, place = walk.logits(drawn), walk.begun + walk.placed - laid.begin
            first, end = self.vocabulary.range_of(makes, place)
            return F.pad(found[..., first:end], (first, found.shape[-1] - end), value=-math.inf)

        def finished(here: bool) -> bool:
            request.progress(walk.placed + 1, len(walk.numbers))
            return request.everywhere(here)

        drawn = sampler.sample(logits, end=None, rng=rng, finished=finished, steps=walk.numbers)
        walk.finish(drawn.tokens)
        made = self.vocabulary.codes_of(makes, canvas.tokens[:, laid.begin :, 0])
        return Generated(made[..., 0] if stream.num_codebooks == 1 else made)

    def _task_of(self, request: Request) -> tuple[str, int]:
        """The task that is asked for by what is given, and how many frames it shows."""
        given = {name for name in request.given if not name.endswith("_mask")}
        frame = self.vocabulary.streams[self.makes].frame_codes
        shown = request.given[self.makes].shape[1] // frame if self.makes in given else 0
        for name, task in self.vocabulary.tasks.items():
            fits = task.shows[0] <= shown <= task.shows[1]
            if task.makes == self.makes and set(task.given) == given - {self.makes} and fits:
                return name, shown
        known = "; ".join(
            f"{name}: given {', '.join(task.given) or 'nothing'}, shown {task.shows[0]} to {task.shows[1]} frames"
            for name, task in self.vocabulary.tasks.items()
        )
        raise UserError(
            f"got {', '.join(sorted(given)) or 'nothing'} and {shown} frames of codes; the run has tasks {known}"
        )


def _among(task: Tensor, numbers: tuple[int, ...]) -> Tensor:
    return torch.stack([task == number for number in numbers]).any(0)
