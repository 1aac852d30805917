"""Several losses of one network output, weighted by their gradients with respect to it, whatever their scales.

Source: Défossez et al. 2022 (EnCodec), section 3.4, "Balancer".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nexus_scale.contracts import SumOverRanks
from nexus_scale.kernels.transfer import to_device


class Balancer:
    """sum of weight_i / (sum of weights) * g_i / average(|g_i|), with g_i = d loss_i / d output of one sample.

    Averages are over samples of the global batch and, decaying, over steps. A step uses those of the steps before, so that
    neither micro-batches nor workers change it; a loss without an average yet is measured and does not count.

    Args:
        weights: by loss, the share of the gradient that should come from it.
        decay: part of an average that stays after a step.
        total_norm: of the balanced gradient of one sample, if all were aligned.
    """

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.999, total_norm: float = 1.0):
        self.weights, self.decay, self.total_norm = dict(weights), decay, total_norm
        self.names = list(self.weights)
        # Running sums of norms and of their weights: their quotient has no bias at the start.
        self.norms = torch.zeros(len(self.names), dtype=torch.float64)
        self.norm_weights = torch.zeros(len(self.names), dtype=torch.float64)
        self._seen: list[tuple[int, Tensor, int]] = []  # number of the loss, sum of norms, samples

    def gradient(self, losses: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """The balanced gradient with respect to `output`, like it, without a graph.

        Args:
            losses: means over the samples of the micro-batch, functions of `output` alone.
            output: of the network, (B, ...), in the graph of the losses.
        """
        self._place(output.device)
        known = {name: self.norm_weights[self.names.index(name)] > 0 for name in self.names if name in losses}
        share = sum(torch.where(here, self.weights[name], 0.0) for name, here in known.items())
        total = torch.zeros_like(output)
        for name, loss in losses.items():
            if not self.weights[name]:
                continue
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            per_sample = torch.linalg.vector_norm(gradient.flatten(1), dim=1) * len(gradient)  # (B,), the mean undone
            i = self.names.index(name)
            self._seen.append((i, per_sample.sum(), len(per_sample)))
            factor = self.total_norm * self.weights[name] / share / (self.norms[i] / self.norm_weights[i] + 1e-12)
            total += torch.where(known[name], gradient * factor, 0.0)
        return total

    def _place(self, device: torch.device) -> None:
        """Averages lie where gradients are, so that neither waits for the other."""
        if self.norms.device != device:
            self.norms, self.norm_weights = to_device(self.norms, device), to_device(self.norm_weights, device)

    def averages(self) -> dict[str, Tensor]:
        """Average gradient norm of each loss measured so far."""
        return {
            name: self.norms[i] / self.norm_weights[i] for i, name in enumerate(self.names) if self.norm_weights[i] > 0
        }

    def follow(self, sum_over_ranks: SumOverRanks) -> None:
        """Updates the averages with the step's norms. A collective."""
        mine = torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.norms.device)
        for i, norms, samples in self._seen:
            mine[i, 0] += norms
            mine[i, 1] += samples
        self._seen = []
        total = sum_over_ranks(mine)  # (losses, 2): sums of norms, samples
        measured = (total[:, 1] > 0) & total[:, 0].isfinite()
        mean = total[:, 0] / total[:, 1].clamp(min=1)
        zero = torch.zeros_like(mean)
        self.norms = torch.where(measured, self.decay * self.norms + torch.where(measured, mean, zero), self.norms)
        self.norm_weights = torch.where(measured, self.decay * self.norm_weights + 1, self.norm_weights)

    def state_dict(self) -> dict[str, Tensor]:
        return {"norms": self.norms, "norm_weights": self.norm_weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.norms, self.norm_weights = state["norms"].double(), state["norm_weights"].double()
        self._seen = []
