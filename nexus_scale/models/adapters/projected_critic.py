"""A critic that judges by what a frozen network computes within: small heads on the answers of its blocks, which alone learn.

Source: Sauer et al. 2021, "Projected GANs converge faster"; Sauer et al. 2024, "Fast high-resolution image synthesis with latent
adversarial diffusion distillation", whose features are the teacher's own. Width and shape of the heads are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus_scale.contracts import Adapter, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import AdaLayerNorm


class Head(nn.Module):
    """Features (B, P, C) -> an answer for each place, (B, P)."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.norm = AdaLayerNorm(channels, staged=False)
        self.fc1, self.fc2 = Linear(channels, hidden_size), Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(self.norm(x)))).squeeze(-1)


class ProjectedCritic(Adapter):
    """Of x_t, t and conditions as its base takes them, each block's answers, a tuple of (B, P_i): larger for data. With `slopes=True` a
    pair: the answers, and the squared norm of their heads' gradients at the features that they read, (B,), which can be differentiated.
    """

    def __init__(
        self,
        *,
        base: Callable[[], Network],
        hidden_size: Annotated[int, Field(ge=1, le=65_536)] = 64,
        every: Annotated[int, Field(ge=1, le=1000)] = 1,
    ):
        """
        Args:
            base: makes the network whose features are judged; the program gives it.
            hidden_size: of the heads.
            every: a head reads each so many of the base's blocks, its last among them.
        """
        super().__init__()
        with torch.device("meta"):
            made = base()
        example = made.example_inputs(1, 4, "meta")
        if not made.blocks() or example is None:
            raise UserError(
                f"projected_critic: {type(made).__name__} has no blocks or no example of its inputs; judge by another network"
            )
        self.hidden_size, self.every = hidden_size, every
        self._features: list[Tensor] = []
        self._hold(made)
        with self.at_work(), torch.no_grad():
            made(*example)
        self.heads = nn.ModuleList(Head(one.shape[2], hidden_size) for one in self._taken())

    def _hold(self, base: Network) -> None:
        vars(self)["base"] = base  # not a part of this network
        self.num_classes = base.num_classes
        for block in list(base.blocks())[:: -self.every]:
            block.register_forward_hook(self._seen)

    def _seen(self, block: nn.Module, inputs: Any, out: Any) -> None:
        if self.at_works:
            first: Tensor = out if isinstance(out, Tensor) else out[0]
            self._features.append(first if first.ndim == 3 else first.flatten(2).transpose(1, 2))

    def _taken(self) -> list[Tensor]:
        found, self._features = self._features, []
        return found

    def attach(self, base: Network) -> None:
        if type(base) is not type(self.base) or len(base.blocks()) != len(self.base.blocks()):
            raise ValueError(f"the critic is for {type(self.base).__name__}; the base is a {type(base).__name__}")
        self._hold(base)

    def init_weights(self) -> None:
        """Heads N(0, 0.02^2), whose first answers are near zero."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.normal_(module)
            elif isinstance(module, AdaLayerNorm):
                module.init_weights()

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def judged(*args: Any, slopes: bool = False, **kwargs: Any) -> Any:
            self._taken()
            with self.at_work():
                call(*args, **kwargs)
            features = [one.detach().requires_grad_() for one in self._taken()] if slopes else self._taken()
            answers = tuple(head(one) for head, one in zip(self.heads, features, strict=True))
            if not slopes:
                return answers
            gradients = torch.autograd.grad([one.sum() for one in answers], features, create_graph=True)
            wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in gradients]
            return answers, torch.stack([one.square().flatten(1).sum(1) for one in wide]).sum(0)

        return judged
