"""Vector quantisation by books whose entries follow what they code by moving averages: residual, where each book codes what those before
it leave, or parallel, where each has an input of its own.

The averages are of the *global* batch: counts and sums are added up over micro-batches and ranks once a step, so that the
books do not depend on the number of workers. An entry that is hardly used moves to a latent of the batch, drawn by progress.

Source: Zeghidour et al. 2021 (SoundStream), section III.C and algorithm 1; van den Oord et al. 2017 (VQ-VAE), appendix A.1;
Dhariwal et al. 2020 (Jukebox), restarts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.kernels import transfer
from nexus_scale.kernels.transfer import to_device

SMOOTHING = 1e-5
"""Laplace smoothing of an entry's share, so that an entry without latents does not divide by zero."""


class Quantised(NamedTuple):
    """latents: (B, D, T) as quantised, with the gradient of what came in; codes: (B, T, K'), K' the number of books that coded;
    commitment: (B,), mean squared distance of each residual from its entry, mean over books."""

    latents: Tensor
    codes: Tensor
    commitment: Tensor


class Seen(NamedTuple):
    """What a step's micro-batch showed the books: latents (B, D, T), their codes (B, T, K'), places of the samples in the global
    batch (B,)."""

    latents: Tensor
    codes: Tensor
    positions: Tensor


class FollowingBooks(nn.Module):
    """K books of V entries of size D. Until the first step has shown them latents, they let them through as they are, and are zero.

    Args:
        decay: part of an average that stays after a step.
        dead_below: entries whose average count of a step is below it move to a latent of the batch; 0 keeps all.
        kmeans_iterations: of k-means on the first global batch, with which the books begin.
    """

    codebooks: Tensor
    cluster_sum: Tensor
    cluster_size: Tensor
    initialised: Tensor

    def __init__(
        self,
        *,
        num_codebooks: int,
        codebook_size: int,
        dim: int,
        decay: float,
        dead_below: float,
        kmeans_iterations: int,
    ):
        super().__init__()
        self.decay, self.dead_below, self.kmeans_iterations = decay, dead_below, kmeans_iterations
        self.register_buffer("codebooks", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("cluster_sum", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codebooks, codebook_size))
        self.register_buffer("initialised", torch.zeros(1))
        self._begun: tuple[tuple[int, int], bool] | None = (
            None  # the version of `initialised` that was read, and what it said
        )

    @property
    def num_codebooks(self) -> int:
        return self.codebooks.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.codebooks.shape[1]

    def looked_up(self, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) as book `k` codes it: the entries with the gradient of x, codes (B, T), commitment (B,)."""
        precise = x.to(self.codebooks.dtype)  # books stay in float32 even if networks compute in lower precision
        code = nearest(precise, self.codebooks[k])
        entry = F.embedding(code, self.codebooks[k])
        passed = torch.where(self.initialised > 0, entry + (precise - precise.detach()), precise)
        return passed.to(x.dtype), code, (precise - entry).square().mean((1, 2)) * self.initialised

    def _own(self, left: Tensor, k: int) -> Tensor:
        """What book `k` codes of what is left (N, ...) of the latents: (N, D)."""
        raise NotImplementedError

    def _left(self, left: Tensor, entry: Tensor) -> Tensor:
        """What is left for the next books, where a book coded by `entry` (N, D)."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ learning

    @torch.no_grad()
    def follow(
        self, seen: Sequence[Seen], sum_over_ranks: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Updates the books: averages move, dead entries are moved to latents. A collective.

        Args:
            seen: this rank's micro-batches, all coded by equally many books.
            sum_over_ranks: sum of a tensor over ranks.
            generator: equal on all ranks.
        Returns:
            `perplexity`: exp of the entropy of the codes of the global batch, mean over books, in [1, V];
            `replaced`: part of the entries that moved. Both are equal on all ranks; later than the first step with their count, which is 0
            where a batch was not finite.
        """
        rows = torch.cat([one.latents.to(self.codebooks.dtype).transpose(1, 2).flatten(0, 1) for one in seen])  # (N, D)
        codes = torch.cat([one.codes.flatten(0, 1) for one in seen])  # (N, K')
        if not self._has_begun():
            return self._begin(GlobalBatch(rows, seen, sum_over_ranks), rows, generator)
        num_books = codes.shape[1]
        inputs = self._inputs(rows, codes)  # (K', N, D)
        found = [sums_by_code(inputs[k], codes[:, k], self.codebook_size) for k in range(num_books)]
        total = sum_over_ranks(torch.stack(found))  # (K', V, 1 + D): counts, sums
        sound = total.isfinite().all()  # batches that are not finite are skipped, as the engine does
        free = transfer.reads_freely(sound.device)
        if free and not bool(sound):
            return {}
        counts, sums = total[..., 0], total[..., 1:]
        books = [held[:num_books] for held in (self.cluster_size, self.cluster_sum, self.codebooks)]
        before = [] if free else [held.clone() for held in books]
        self.cluster_size[:num_books].lerp_(counts, 1 - self.decay)
        self.cluster_sum[:num_books].lerp_(sums, 1 - self.decay)
        self.codebooks[:num_books] = self.cluster_sum[:num_books] / self._smoothed(num_books)
        dead = self.cluster_size[:num_books] < self.dead_below  # (K', V), equal on all ranks
        if not free or bool(dead.any()):
            self._replace(dead, inputs, GlobalBatch(rows, seen, sum_over_ranks), generator)
        for held, old in zip(books, before, strict=False):
            held.copy_(torch.where(sound, held, old))
        figures = {"perplexity": perplexity(counts), "replaced": dead.float().mean()}
        return {name: (torch.where(sound, value, 0.0), sound.float()) for name, value in figures.items()}

    def _has_begun(self) -> bool:
        """Whether the books have entries. Waits for the device where that may have changed: in a run's first step, and after a load."""
        version = self.initialised.data_ptr(), self.initialised._version
        if self._begun is None or self._begun[0] != version:
            self._begun = version, bool(self.initialised > 0)
        return self._begun[1]

    def _begin(
        self, batch: GlobalBatch, rows: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Each book by k-means on what it has to code of the first global batch."""
        counts, left = [], rows
        for k in range(self.num_codebooks):
            rows = self._own(left, k)
            # Distinct latents if possible: an entry equal to another would never be chosen.
            chosen = torch.randperm(batch.size, generator=generator)
            chosen = chosen[torch.arange(self.codebook_size) % batch.size]
            book = batch.rows_at(chosen, rows)  # (V, D)
            for _ in range(self.kmeans_iterations):
                total = batch.sum_over_ranks(sums_by_code(rows, nearest(rows, book), self.codebook_size))
                count, mean = total[:, :1], total[:, 1:] / total[:, :1].clamp(min=1)
                book = torch.where(count > 0, mean, book)
            code = nearest(rows, book)
            count = batch.sum_over_ranks(sums_by_code(rows, code, self.codebook_size))[:, 0]  # (V,)
            if not bool(book.isfinite().all()):
                return {}
            self.codebooks[k], self.cluster_size[k] = book, count
            self.cluster_sum[k] = book * count[:, None]
            left = self._left(left, F.embedding(code, book))
            counts.append(count)
        self.initialised.fill_(1)
        return {"perplexity": perplexity(torch.stack(counts)), "replaced": torch.ones((), device=rows.device)}

    def _replace(self, dead: Tensor, inputs: Tensor, batch: GlobalBatch, generator: torch.Generator) -> None:
        """Moves dead entries (K', V) to inputs (K', N, D) at random places of the global batch: the first of them to the first place
        that is drawn, and so on. As many are drawn as there are entries, so that the host need not know how many are dead."""
        num_books, size = dead.shape
        drawn = to_device(torch.randint(batch.size, (dead.numel(),), generator=generator), dead.device)
        place = drawn[(dead.flatten().cumsum(0) - 1).clamp(min=0)]  # (K' * V,)
        book = torch.arange(num_books, device=dead.device).repeat_interleave(size)
        moved = batch.rows_at(place, inputs, book).view(num_books, size, -1)  # (K', V, D)
        # With the count at which it would just live, so that the averages keep it where it is; EnCodec's code moves the entry
        # alone, and its next average takes it back.
        new = (dead * self.dead_below, moved * self.dead_below, moved)
        for held, value in zip((self.cluster_size, self.cluster_sum, self.codebooks), new, strict=True):
            gone = dead.view(*dead.shape, *[1] * (value.ndim - 2))
            held[:num_books] = torch.where(gone, value.to(held.dtype), held[:num_books])

    def _inputs(self, rows: Tensor, codes: Tensor) -> Tensor:
        """The input of each book for (N, ...) latents, (K', N, D)."""
        found, left = [], rows
        for k in range(codes.shape[1]):
            found.append(self._own(left, k))
            left = self._left(left, F.embedding(codes[:, k], self.codebooks[k]))
        return torch.stack(found)

    def _smoothed(self, num_books: int) -> Tensor:
        """Counts with Laplace smoothing, (K', V, 1)."""
        size = self.cluster_size[:num_books]
        total = size.sum(-1, keepdim=True)
        return ((size + SMOOTHING) / (total + self.codebook_size * SMOOTHING) * total)[..., None]

    def extra_repr(self) -> str:
        return f"{self.num_codebooks} books of {self.codebook_size} x {self.codebooks.shape[2]}, decay={self.decay}"


class ResidualQuantizer(FollowingBooks):
    """K books of V entries of size D, each of which codes what those before it leave; see `FollowingBooks`."""

    def forward(self, z: Tensor, num_books: int | None = None) -> Quantised:
        """z (B, D, T), quantised by the first `num_books` books, or by all."""
        precise = z.to(self.codebooks.dtype)  # books stay in float32 even if networks compute in lower precision
        residual = precise.transpose(1, 2)  # (B, T, D)
        latents = torch.zeros_like(residual)
        codes, commitments = [], []
        for book in self.codebooks[:num_books]:  # (V, D)
            code = nearest(residual, book)  # (B, T)
            entry = F.embedding(code, book)  # (B, T, D)
            commitments.append((residual - entry).square().mean((1, 2)))  # (B,)
            latents = latents + entry
            residual = residual - entry
            codes.append(code)
        latents = latents.transpose(1, 2)  # (B, D, T)
        # Straight through: the value of the entries, the gradient of z.
        latents = latents + (precise - precise.detach())
        latents = torch.where(self.initialised > 0, latents, precise)
        commitment = torch.stack(commitments).mean(0) * self.initialised
        return Quantised(latents.to(z.dtype), torch.stack(codes, dim=-1), commitment)

    def encode(self, z: Tensor, num_books: int | None = None) -> Tensor:
        """z (B, D, T) -> codes (B, T, K') int64."""
        return self.forward(z, num_books).codes

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, T, K') of the first K' books -> latents (B, D, T)."""
        latents = torch.zeros((), device=codes.device)
        for code, book in zip(codes.unbind(-1), self.codebooks, strict=False):
            latents = latents + F.embedding(code, book)
        return latents.transpose(1, 2)

    def _own(self, left: Tensor, k: int) -> Tensor:
        return left

    def _left(self, left: Tensor, entry: Tensor) -> Tensor:
        return left - entry


class ParallelQuantizer(FollowingBooks):
    """K books of V entries of size D, each of which codes an input of its own: `Seen.latents` are the K inputs side by side,
    (B, K * D, T). See `FollowingBooks`."""

    def _own(self, left: Tensor, k: int) -> Tensor:
        return left.unflatten(-1, (self.num_codebooks, -1))[:, k]

    def _left(self, left: Tensor, entry: Tensor) -> Tensor:
        return left


def check_following(name: str, codebook_size: int, decay: float, dead_below: float, kmeans_iterations: int) -> None:
    """Raises a UserError for books that cannot follow, by the arguments of the network `name`."""
    if codebook_size < 2 or kmeans_iterations < 0 or dead_below < 0:
        raise UserError(
            f"{name}: got codebook_size {codebook_size}, kmeans_iterations {kmeans_iterations}, dead_below {dead_below}; "
            "expected at least 2, 0 and 0"
        )
    if not 0 <= decay < 1:
        raise UserError(f"{name}.codebook_decay: got {decay}; expected a share in [0, 1)")


class GlobalBatch:
    """Latents of all ranks by their place, position * T + t, of which each rank holds its own; making one is a collective."""

    def __init__(self, rows: Tensor, seen: Sequence[Seen], sum_over_ranks: Callable[[Tensor], Tensor]):
        self.sum_over_ranks = sum_over_ranks
        # A number of the host's travels from host to host: no device is waited for.
        self.size = int(sum_over_ranks(torch.tensor([float(len(rows))], dtype=torch.float64)))
        steps = seen[0].latents.shape[2]
        positions = torch.cat([one.positions for one in seen]).cpu()
        places = (positions[:, None] * steps + torch.arange(steps)).flatten()  # (N,)
        held = torch.full((self.size,), -1)
        held[places] = torch.arange(len(rows))
        self._held = to_device(held, rows.device)

    def rows_at(self, places: Tensor, rows: Tensor, books: Tensor | None = None) -> Tensor:
        """Rows at these places (n,) on all ranks, (n, D). A collective.

        Args:
            rows: this rank's, (N, D), or (K, N, D) with a book for each place in `books` (n,).
        """
        held = self._held[to_device(places, rows.device)]
        mine = rows[held] if books is None else rows[books, held]
        return self.sum_over_ranks(torch.where(held[:, None] >= 0, mine, torch.zeros_like(mine)))


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """Indices of the entries nearest to x (..., D) in a book (V, D)."""
    distance = x.square().sum(-1, keepdim=True) - 2 * x @ book.T + book.T.square().sum(0)  # (..., V)
    return (-distance).max(-1).indices


def sums_by_code(rows: Tensor, codes: Tensor, size: int) -> Tensor:
    """For each of `size` codes, how many rows have it and their sum: rows (N, D), codes (N,) -> (V, 1 + D)."""
    chosen = F.one_hot(codes, size).to(
        rows.dtype
    )  # (N, V); a product has one order of sums, a scatter on a GPU has none
    return torch.cat([chosen.sum(0)[:, None], chosen.T @ rows], dim=1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts (K, V), mean over books: how many entries are in use."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(-1).exp().mean()
