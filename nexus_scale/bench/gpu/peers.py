"""The other side: what a user would write with diffusers' classes.

Blocks are compiled; bf16 autocast over float32 weights, torch's fused AdamW, clipping where the recipe has it, and an average over lists
of tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.bench.gpu.cases import Task
from nexus_scale.bench.gpu.training import batch_of, fields_of, forward_flops, objective_of, recipe_of
from nexus_scale.config.recipe import network_class
from nexus_scale.models.layers.text import compose_text

DECAY = 0.9999


def theirs_of(task: Task, arguments: Mapping[str, Any], device: torch.device) -> Any:
    """diffusers' network of the same sizes as ours, with its own first weights, made on the device."""
    import diffusers

    form = importlib.import_module(f"nexus_scale.interop.{task.theirs}").DIFFUSERS
    config = form.config_of(form.network_of(arguments))
    with device:
        return getattr(diffusers, form.class_name).from_config(config)


def call_dit(network: nn.Module, x: Tensor, t: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    y: Tensor = network(x, timestep=(t * 999).long(), class_labels=rows["label"]).sample
    return y[:, : x.shape[1]]


def call_mmdit(network: nn.Module, x: Tensor, t: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    y: Tensor = network(x, rows["text"], rows["pooled"], t * 1000, return_dict=False)[0]
    return y


def call_cogvideox(network: nn.Module, x: Tensor, t: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    frames = x.transpose(1, 2)  # (B, F, C, H, W)
    y: Tensor = network(frames, rows["text"], (t * 999).long(), return_dict=False)[0]
    return y.transpose(1, 2)


CALLS: dict[str, Callable[..., Tensor]] = {"dit": call_dit, "mmdit": call_mmdit, "cogvideox": call_cogvideox}


class Theirs:
    """diffusers' network in a bare loop, on the same made-up samples."""

    waited, stages = 0.0, None

    def __init__(self, task: Task, device: torch.device, *, tiny: bool, compiled: bool = True):
        self.task, self.device = task, device
        self.recipe = recipe_of(task, tiny)
        self.fields = fields_of(task, self.recipe)
        self.flops = forward_flops(self.recipe, objective_of(task, self.recipe), self.fields)
        spec = self.recipe.trained()["model"]
        self.arguments = network_class(spec)[1]
        self.network = theirs_of(task, self.arguments, device)
        if task.checkpointing:
            self.network.enable_gradient_checkpointing()
        if compiled:
            for block in self.network.transformer_blocks:
                block.compile()
        self.network.train()
        self.parameters = list(self.network.parameters())
        optimizer = spec.optimizer or self.recipe.optimizer
        self.clip = optimizer.clip_grad_norm
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def steps_of(self, micro_batch: int) -> Callable[[int], None]:
        batch = batch_of(self.fields, micro_batch, self.device)

        def do(count: int) -> None:
            for _ in range(count):
                self._step(batch.on(self.device).fields)

        return do

    def _step(self, rows: Mapping[str, Tensor]) -> None:
        mean, logvar = rows["moments"].chunk(2, 1)
        x0 = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        eps, t = torch.randn_like(x0), torch.rand(len(x0), device=self.device)
        a = t.view(-1, *[1] * (x0.dim() - 1))
        with torch.autocast(self.device.type, torch.bfloat16):
            out = CALLS[self.task.theirs](self.network, (1 - a) * x0 + a * eps, t, self._conditions(rows))
        loss = F.mse_loss(out.float(), eps - x0)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - DECAY)

    def _conditions(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch with the texts of several encoders put together, as SD3's pipeline gives them to its network."""
        if self.task.theirs != "mmdit":
            return rows
        text, _, pooled = compose_text(rows, self.arguments["text_dim"])
        return {**rows, "text": text, "pooled": pooled}
