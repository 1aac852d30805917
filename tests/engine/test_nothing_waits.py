"""In a step the host reads nothing from the device, so that it can run ahead: every family, on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nexus_scale.contracts import Loss
from nexus_scale.contracts import data as contracts_data
from nexus_scale.kernels import choice, transfer
from nexus_scale.kernels.transfer import read_later
from nexus_scale.objectives.denoising import Denoising
from tests.config.test_every_recipe import families
from tests.distributed import run_ranks
from tests.unread import NoReads, on_meta, trainer_of, unread

RECIPES = (
    "autoregressive/tiny_speech", "beta_vae/tiny_fashion_mnist", "masked/tiny_speech",
    "codec/tiny_speech", "cogvideox/tiny_emoji", "control_net/tiny_openmoji", "guidance_distillation/tiny_openmoji",
    "consistency/tiny_fashion_mnist", "ddpm/tiny_fashion_mnist", "dit/b2_imagenet",
    "edm/cifar10", "facodec/paper", "flow_matching/cifar10", "flux/tiny_openmoji", "gan/mixture", "gan/tiny_acgan_fashion_mnist",
    "gan/tiny_fashion_mnist", "instruct_pix2pix/sd15", "ip_adapter/tiny_openmoji", "lcm/tiny_fashion_mnist",
    "mean_flow/tiny_fashion_mnist",
    "lora/tiny_line_art", "mmdit/sd35_medium", "mmdit/tiny_openmoji", "musicgen/melody",
    "musicgen/small", "pixart/512", "r3gan/tiny_openmoji", "rectified_flow/tiny_fashion_mnist_reflow", "sit/s2_imagenet",
    "soundstorm/tiny_reader", "soundstorm/tiny_speech",
    "stable_diffusion/tiny_openmoji", "vae/mlp_fashion_mnist", "vae/sd_f8", "vae/tiny_clips", "vae/tiny_openmoji", "valle/tiny_speech",
    "voicebox/tiny_speech", "voicebox/vocoder_tiny_speech", "naturalspeech3/tiny_speech",
    "lora/turbo_tiny_openmoji", "lora/textual_inversion_sd15", "wgan/tiny_fashion_mnist", "wgan_gp/tiny_fashion_mnist",
    "cyclegan/tiny_emoji", "pix2pix/tiny_emoji",
    "vq_vae/fsq_tiny_openmoji", "vq_vae/tiny_openmoji", "magvit2/tiny_clips", "videopoet/300m",
)  # fmt: skip
"""One of each family, and where a family has code for several kinds (texts packed or masked, clips or images) one of each."""


ENGINES = ("replicated", "deepspeed")
"""Those of several workers; the local one is that of the families' steps."""


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    choice.forget()
    choice.choose({}, "cpu")  # also where there is a GPU: its kernels take no tensors without values
    on_meta(monkeypatch)
    yield
    choice.forget()


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two ranks, of which there is one: collectives leave its tensors as they are."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_no_family_is_left_out() -> None:
    assert {name.split("/")[0] for name in RECIPES} == {name.split("/")[0] for name in families()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_reads_nothing_from_the_device(name: str, meta: None) -> None:
    trainer = trainer_of(name)
    with unread():
        meter, _ = trainer._step(trainer.steps - 1)  # in the last step all phases have begun
    assert meter.sums["loss" if "loss" in meter.sums else next(key for key in meter.sums if key.endswith("/loss"))]


def test_nor_do_importance_sampling_and_weights(meta: None) -> None:
    trainer = trainer_of("dit/tiny_fashion_mnist")
    trainer.objective = Denoising(
        path="ddpm_cosine", target="v", times={"name": "importance", "of": "discrete"}, weight="soft_min_snr", distance="pseudo_huber",
        variance="learned", conditions=("label",), input="image",
    )  # fmt: skip
    with unread():
        trainer._step(0)
        trainer._step(1)


def test_nor_in_bf16_nor_with_several_ranks(meta: None, two_ranks: None) -> None:
    trainer = trainer_of("mmdit/tiny_openmoji", engine="replicated", precision="bf16", ranks=2)
    with unread():
        trainer._step(0)


def learns_unread(rank: int, world_size: int, engines: tuple[str, ...]) -> list[str]:
    """Two steps under each engine, as it would learn on a GPU: backward and step read nothing. Their losses and norms, read later."""
    choice.choose({}, "cpu")
    patch = pytest.MonkeyPatch()
    patch.setattr(transfer, "reads_freely", lambda device: False)
    found = []
    for name in engines:
        trainer = trainer_of("mmdit/tiny_openmoji", device="cpu", engine=name, ranks=world_size)
        for method in ("backward", "step"):
            patch.setattr(trainer.engine, method, watched(getattr(trainer.engine, method)))
        sums = [trainer._step(step)[0].sums for step in range(2)]
        found.append(
            str([(float(one["loss"][0]), float(one["grad_norm"][0]), float(one["skipped"][0])) for one in sums])
        )
    patch.undo()
    return found


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    def unreading(*args: Any, **kwargs: Any) -> Any:
        with NoReads():
            return call(*args, **kwargs)

    return unreading


def test_engines_of_several_workers_read_nothing_while_they_learn() -> None:
    first, second = run_ranks(2, learns_unread, ENGINES, timeout=300)
    assert first == second and "nan" not in str(first)


def test_a_mask_that_the_host_does_not_know_is_found(meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts_data, "keep_on_host", lambda there, here: there)
    for name in ("mmdit/tiny_openmoji", "flux/tiny_openmoji", "cogvideox/tiny_emoji"):
        trainer = trainer_of(name)
        with unread(), pytest.raises(NotImplementedError):
            trainer._step(0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_gpu_no_call_within_a_step_waits(name: str) -> None:
    """By torch's own alarm, which knows calls that synchronise host and device."""
    trainer = trainer_of(name, device="cuda", precision="bf16")
    for step in range(3):  # kernels are chosen, constants sent, books begin
        trainer._step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter, _ = trainer._step(3)
        read = read_later([value for pair in meter.sums.values() for value in pair if isinstance(value, torch.Tensor)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(value) for value in read())


@pytest.mark.gpu
def test_what_is_read_later_is_what_was_computed() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    values = [x.sum(), x.double().mean(), torch.tensor(7.0), (x > 0).sum()]
    expected = [float(value) for value in values]
    read = read_later(values)
    x.zero_()
    assert read() == pytest.approx(expected, rel=1e-6)


PLANTED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.sum(0).tolist(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: x * torch.tensor([1.0], device=x.device),
    "to": lambda x: x + torch.ones(1).to(x.device),
    "index": lambda x: x[torch.zeros(1, dtype=torch.int64)],
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_wait_is_found(planted: str, meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("dit/tiny_fashion_mnist")
    loss = trainer.objective.loss

    def waits(*args: object) -> Loss:
        found = loss(*args)  # type: ignore[arg-type]
        PLANTED[planted](torch.ones(3, device=trainer.engine.device))
        return found

    monkeypatch.setattr(trainer.objective, "loss", waits)
    with unread(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        trainer._step(0)
