"""A language of two streams whose joint distribution is known: each code of the first follows its predecessor, each of the second follows
its own predecessor and the first stream's code of its frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Batch, Cond, Objective
from nexus_scale.kernels.random import ProgressRng

V, T, K = 4, 4, 2


class Language(NamedTuple):
    """Chances: `begin` (V,), `first` (V, V) of a code after another, `second` (V, V, V) of one, by (code before, code beside, code); the
    second stream begins after code 0."""

    begin: Tensor
    first: Tensor
    second: Tensor

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """(count, T, K) int64."""
        generator = torch.Generator().manual_seed(seed)

        def chosen(chances: Tensor) -> Tensor:
            return torch.multinomial(chances, 1, generator=generator)[:, 0]

        a = chosen(self.begin.expand(count, -1))
        b = chosen(self.second[torch.zeros_like(a), a])
        frames = [torch.stack([a, b], 1)]
        for _ in range(T - 1):
            a = chosen(self.first[a])
            b = chosen(self.second[b, a])
            frames.append(torch.stack([a, b], 1))
        return torch.stack(frames, 1)

    @property
    def joint(self) -> Tensor:
        """The chance of each sentence, (V,) * (T * K) float64, axes in the order (0, 0), (0, 1), (1, 0), ..."""
        chances = self.begin[:, None] * self.second[0]  # (a, b)
        for _ in range(T - 1):
            following = self.first[:, None, :, None] * self.second.permute(1, 0, 2)[None].permute(0, 2, 1, 3)
            chances = chances[..., None, None] * following.reshape(*[1] * (chances.ndim - 2), V, V, V, V)
        return chances

    @property
    def entropy(self) -> float:
        """Nats a code."""
        joint = self.joint
        return float(torch.special.entr(joint).sum()) / (T * K)

    def log_chances(self, known: Tensor, place: int) -> Tensor:
        """Of the code at `place` (axis of `joint`), given those that are known: (B, V) from (B, T * K) codes, -1 where unknown."""
        joint, rows = self.joint, []
        for row in known.tolist():
            index = tuple(slice(None) if code < 0 or axis == place else code for axis, code in enumerate(row))
            left = joint[index]
            axis = sum(1 for code in row[:place] if code < 0)
            others = [other for other in range(left.ndim) if other != axis]
            rows.append(left.sum(others) if others else left)
        found = torch.stack(rows)
        return (found / found.sum(1, keepdim=True)).log().float()


def a_language() -> Language:
    generator = torch.Generator().manual_seed(3)

    def chances(*shape: int) -> Tensor:
        return (1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)

    return Language(chances(V), chances(V, V), chances(V, V, V))


def batch_of(codes: Tensor, lengths: Tensor | None = None) -> Batch:
    """Sentences, all of them real, or as long as they say."""
    fields = {"codes": codes}
    if lengths is not None:
        fields["codes_mask"] = torch.arange(codes.shape[1]) < lengths[:, None]
    return Batch(fields, torch.arange(len(codes)), torch.arange(len(codes)))


class Knowing:
    """A network that knows the language: the true chances of each step, for any pattern, from what it is shown.

    In the shape of the objective's network: `net(tokens, cond)` and, one step after the other, `prefill` and `extend`.
    """

    def __init__(self, language: Language, places: Tensor):
        """places: the step of each code, (T, K)."""
        self.language, self.places, self.seen = language, places, torch.zeros(0)

    def __call__(self, tokens: Tensor, cond: Cond) -> Tensor:
        return torch.stack([self._after(tokens[:, : step + 1]) for step in range(tokens.shape[1])], dim=1)

    def prefill(self, tokens: Tensor, cond: Cond, capacity: int) -> tuple[Tensor, None]:
        self.seen = tokens
        return self._after(tokens), None

    def extend(self, tokens: Tensor, memory: None) -> Tensor:
        self.seen = torch.cat([self.seen, tokens[:, None]], dim=1)
        return self._after(self.seen)

    def _after(self, tokens: Tensor) -> Tensor:
        """Of the next step, (B, K, V); 0 where it has no code."""
        B, step = len(tokens), tokens.shape[1]
        known = torch.full((B, T * K), -1)
        answer = torch.zeros(B, K, V)
        for t in range(T):
            for k in range(K):
                if self.places[t, k] < step:
                    known[:, t * K + k] = tokens[:, self.places[t, k], k]
        for t in range(T):
            for k in range(K):
                if self.places[t, k] == step:
                    answer[:, k] = self.language.log_chances(known, t * K + k)
        return answer


class KnowingMasked:
    """A network that knows the language, in the shape of the masked objective's: `net(codes, level, cond)`."""

    def __init__(self, language: Language):
        self.language = language

    def __call__(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """(B, T, V): of each code of the level, given all that are not hidden; of one that is shown, given the others."""
        known = torch.where(codes == V, -1, codes).flatten(1)
        known = torch.nn.functional.pad(known, (0, T * K - known.shape[1]), value=-1)  # of a sentence's beginning
        return torch.stack([self.language.log_chances(known, t * K + level) for t in range(codes.shape[1])], dim=1)


def learnt(objective: Objective, net: nn.Module, language: Language, steps: int, frames: int = T) -> nn.Module:
    """The network after so many steps of Adam, each on beginnings of new sentences."""
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = batch_of(language.draw(256, seed=step + 1)[:, :frames])
        loss = objective.loss("main", {"model": net}, batch, ProgressRng(0, step, "main", batch.positions), step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    return net.eval()
