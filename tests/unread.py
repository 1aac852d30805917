"""Steps of a training in which whoever reads a tensor's value, or copies to the device so that one must wait, fails.

The meta device, whose tensors have no values, stands for a GPU: what a host must know it then has to have from elsewhere, as on a GPU
where it runs ahead. Engines are also watched on the CPU, with real collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import Adapter, Frozen
from nexus_scale.contracts import Batch, Progress
from nexus_scale.data.loader import Loader
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, local
from nexus_scale.models.audio.quantization import FollowingBooks
from nexus_scale.rehearsal.batches import maker
from nexus_scale.train import make_objective, open_data
from nexus_scale.trainer import Trainer

PADDED = ("text", "text_2", "text_3")
"""Fields that get a mask in these batches, with padding, where their data have none."""


class _NoRehearsal(TorchFunctionMode):
    """Hides that tensors are on the meta device from code that would do less there, and sees `torch.tensor` on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        made = func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu"
        assert not made, "torch.tensor on the device copies from ordinary memory and waits; see kernels/transfer.py"
        return func(*args, **kwargs)


class _NoWaitingCopies(TorchDispatchMode):
    """Copies to the device are asynchronous, and no operation takes a tensor of the host beside one of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = torch.device(kwargs.get("device") or "cpu").type != "cpu" or any(
            t.device.type != "cpu" for t in tensors
        )
        from_host = [t for t in tensors if t.device.type == "cpu" and t.ndim]
        if there and from_host:
            copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            assert copies and asynchronous, f"{func} takes {tuple(from_host[0].shape)} from the host, and waits for it"
        return func(*args, **kwargs)


aten: Any = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
"""What returns a value to the host, or a shape that depends on values."""


class NoReads(TorchDispatchMode):
    """On tensors with values, where none of the host's is read either: whoever reads one fails."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put_.default) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert func not in READS and not masks, f"{func} reads a value"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Within it a tensor of the meta device is one of a GPU that nobody may wait for."""
    with _NoWaitingCopies(), _NoRehearsal():
        yield


def trainer_of(
    name: str, device: str = "meta", engine: str = "local", precision: str = "float32", ranks: int = 1
) -> Trainer:
    """A recipe's `tiny:` form on a device, in two micro-batches a step, its texts padded; without callbacks."""
    recipe = recipes.load_recipe(name, tiny=True)
    dataset = open_data(recipe, Path("none"))
    objective = make_objective(recipe, dataset.latent_stats)
    nets = {
        role: NetSpec(
            make=maker(one),
            optimizer=None if isinstance(one, Frozen) else one.optimizer or recipe.optimizer,
            frozen=isinstance(one, Frozen),
            adapts=one.adapts if isinstance(one, Adapter) else "",
        )
        for role, one in recipe.built().items()
    }
    micro = recipe.global_batch // ranks // 2
    settings = EngineSettings(
        engine=engine, micro_batch=micro, accumulation=2, steps=recipe.steps, device=device, precision=precision
    )
    progress = Progress()
    loader = Loader(
        dataset,
        seed=0,
        global_batch=recipe.global_batch,
        micro_batch=micro,
        rank=0,
        world_size=ranks,
        progress=progress,
        prefetch=0,
        device=device,
    )
    return Trainer(
        steps=recipe.steps, seed=0, objective=objective, engine=build_engine(nets, recipe.averages(), settings, None, objective.needs),
        next_batches=lambda: padded(loader.next_batches()), callbacks=[], progress=progress, stage=lambda stage: None,
    )  # fmt: skip


def padded(batches: Sequence[Batch]) -> list[Batch]:
    """These batches with masks of their texts: each sample has one token less than the one before it."""
    found = []
    for batch in batches:
        fields = dict(batch.fields)
        for name in PADDED:
            if name in fields and f"{name}_mask" not in fields:
                places, rows = torch.arange(fields[name].shape[1]), torch.arange(len(batch))
                fields[f"{name}_mask"] = places < (len(places) - rows[:, None]).clamp(min=1)
        found.append(replace(batch, fields=fields))
    return found


def on_meta(monkeypatch: Any) -> None:
    """What a run does once, at its start, and the meta device cannot do."""
    twin_of = local.twin_of
    monkeypatch.setattr(local, "twin_of", lambda spec: twin_of(spec).to("meta"))
    # The books begin by k-means on the first global batch, which is watched from the host: once in a run.
    monkeypatch.setattr(FollowingBooks, "_has_begun", lambda self: True)
