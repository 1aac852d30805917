"""Which frames of a sound say which symbol: one symbol after another, each for a number of frames that may be none.

Source: Viterbi 1967; as forced alignment, Rabiner 1989, "A Tutorial on Hidden Markov Models", section III.B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.processes.phones import PAUSES, SILENT


def frames_of(durations: Tensor, num_frames: int) -> Tensor:
    """The place in the text that each of `num_frames` frames belongs to, (B, L) -> (B, T). Frames beyond the sum belong to the last place
    that has any, so that padding tells nothing; without durations all are of the first."""
    ends = durations.cumsum(1)  # (B, L)
    frames = torch.arange(num_frames, device=durations.device).expand(len(durations), -1)
    places = torch.searchsorted(ends, torch.minimum(frames, ends[:, -1:] - 1).contiguous(), right=True)
    return torch.where(ends[:, -1:] > 0, places, 0)


def monotonic(scores: Tensor, num_frames: Tensor, num_symbols: Tensor, optional: Tensor) -> Tensor:
    """The durations of the best monotonic path.

    Args:
        scores: log-probability that a frame says a symbol, (B, T, L).
        num_frames, num_symbols: how many are real, (B,).
        optional: symbols that may have no frame, (B, L) bool; of two neighbours at most one.
    Returns:
        (B, L) int64, adding up to `num_frames`. A sound of fewer frames than it has symbols gives its frames to the first ones.
    """
    B, T, L = scores.shape
    low = torch.finfo(scores.dtype).min / 4
    skips = torch.zeros(B, L, dtype=torch.bool)
    skips[:, 2:] = optional[:, 1:-1]  # symbol j may follow j - 2
    best = torch.full((B, L), low, dtype=scores.dtype)
    best[:, 0] = scores[:, 0, 0]
    if L > 1:
        best[:, 1] = torch.where(optional[:, 0], scores[:, 0, 1], low)
    steps = torch.zeros(T, B, L, dtype=torch.int64)
    held = best.clone()  # of each sample at its last frame
    for t in range(1, T):
        one = torch.nn.functional.pad(best, (1, 0), value=low)[:, :L]
        two = torch.where(skips, torch.nn.functional.pad(best, (2, 0), value=low)[:, :L], low)
        reached, steps[t] = torch.stack((best, one, two)).max(0)
        best = (reached + scores[:, t]).clamp(min=low)
        held = torch.where((t < num_frames)[:, None], best, held)

    rows, last = torch.arange(B), num_symbols - 1
    before = (last - 1).clamp(min=0)
    early = optional[rows, last] & (held[rows, before] > held[rows, last])
    at = torch.where(early, before, last)
    durations = torch.zeros(B, L, dtype=torch.int64)
    for t in range(T - 1, -1, -1):
        real = t < num_frames
        durations[rows, at] += real
        at = (at - torch.where(real, steps[t, rows, at], 0)).clamp(min=0)
    return durations


def aligned(scores: Tensor, frame_mask: Tensor, phonemes: Tensor, phoneme_mask: Tensor) -> Tensor:
    """Durations (B, L) int64 of phonemes (B, L) in a sound, by `scores` (B, T, L) of each phoneme at each frame.

    Marks of stress and length have no frames of their own, and pauses may have none; of pauses in a row the first has the frames. Of a
    text of marks alone the first has all.
    """
    pause, silent = (torch.isin(phonemes, torch.tensor(ids, device=phonemes.device)) for ids in (PAUSES, SILENT))
    sounding = phoneme_mask & ~silent
    sounding[:, 0] |= ~sounding.any(1)
    rows = [row.nonzero()[:, 0] for row in sounding]
    rows = [row[_first_of_pauses(pause[b, row])] for b, row in enumerate(rows)]
    longest = max(len(row) for row in rows)
    places = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])  # (B, L')
    kept = torch.tensor([len(row) for row in rows])
    of_kept = scores.gather(2, places[:, None].expand(-1, scores.shape[1], -1))
    found = monotonic(of_kept.cpu(), frame_mask.sum(1).cpu(), kept, pause.gather(1, places).cpu())
    found = found.to(phonemes.device) * (torch.arange(longest) < kept[:, None]).to(phonemes.device)
    return torch.zeros_like(phonemes).scatter_add_(1, places, found)


def _first_of_pauses(pause: Tensor) -> Tensor:
    """False at pauses that follow a pause, (L,)."""
    follows = torch.zeros_like(pause)
    follows[1:] = pause[1:] & pause[:-1]
    return ~follows
