"""Turbo: a student learns to draw in one step what its critic, by the features of the teacher that both stand on, takes for data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.adapters.lora import Lora
from nexus_scale.models.adapters.projected_critic import ProjectedCritic
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from nexus_scale.objectives.adversarial_distillation import AdversarialDistillation


def base() -> DiT:
    return DiT(latent_channels=2, latent_size=4, hidden_size=16, depth=3, num_heads=2, num_classes=3, learn_sigma=False)


def unet() -> UNetCondition:
    return UNetCondition(
        latent_channels=2,
        latent_size=4,
        widths=(8, 16),
        depth=1,
        transformer_depth=1,
        num_heads=2,
        text_dim=8,
        num_groups=4,
    )


def random(net: torch.nn.Module, deviation: float = 0.2) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * deviation)
    return net


def test_the_critic_reads_the_blocks_of_the_network_that_all_three_share() -> None:
    teacher = random(base()).requires_grad_(False).eval()
    student, critic = Lora(base=base, rank=2), ProjectedCritic(base=base, hidden_size=8, every=2)
    for net in (student, critic):
        net.init_weights()
        net.attach(teacher)
    assert sum(p.numel() for p in critic.parameters()) == 2 * (
        2 * 16 + 16 * 8 + 8 + 8 + 1
    )  # the last block and the first
    objective = AdversarialDistillation(path="rectified_flow", conditions=("label",), distillation_weight=1.0)
    nets = {"model": student, "teacher": teacher, "critic": critic}
    x0 = torch.stack([torch.ones(2, 4, 4), -torch.ones(2, 4, 4)] * 4)
    moments = torch.cat([x0, torch.full_like(x0, -30)], 1)
    batch = Batch({"moments": moments, "label": torch.arange(8) % 2}, torch.arange(8), torch.arange(8))
    assert [phase.trains for phase in objective.phases(0)] == ["critic", "model"]
    optimizers = {
        "critic": torch.optim.Adam(critic.parameters(), 1e-2),
        "student": torch.optim.Adam(student.parameters(), 1e-2),
    }
    seen: dict[str, list[float]] = {"critic": [], "student": []}
    for step in range(30):
        for phase, optimizer in optimizers.items():
            learns, rests = (critic, student) if phase == "critic" else (student, critic)
            learns.requires_grad_(True)
            rests.requires_grad_(False)
            rng = ProgressRng(0, step, phase, batch.positions, torch.device("cpu"))
            loss = objective.loss(phase, nets, batch, rng, step)
            optimizer.zero_grad()
            loss.total.backward()
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learns.parameters())
            optimizer.step()
            seen[phase].append(float(loss.total.detach()))
    assert seen["critic"][0] == pytest.approx(2, abs=0.1), "hinge, of answers near zero"
    assert min(seen["critic"]) < 1.85, "it tells data from what the student first makes"
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        plain = teacher(x0, torch.full((8,), 0.5), {"label": batch["label"]})
        assert torch.equal(plain, base_answer(teacher, x0, batch["label"])), "the teacher's own answers are as before"
        found = objective.validate(nets, batch, rng)
    assert found["loss"].shape == (8,) and float(found["loss_zero"].min()) > 0


def base_answer(teacher: torch.nn.Module, x: Tensor, label: Tensor) -> Tensor:
    alone = random(base()).requires_grad_(False).eval()
    alone.load_state_dict(teacher.state_dict())
    answer: Tensor = alone(x, torch.full((8,), 0.5), {"label": label})
    return answer


def test_r1_is_the_heads_slope_at_the_features_of_data() -> None:
    """By differences: the answers' sum at features moved a little along their gradient; and it reaches the heads, not the base."""
    critic = ProjectedCritic(base=base, hidden_size=4).double()
    teacher = random(base()).double().requires_grad_(False).eval()
    random(critic)
    critic.attach(teacher)  # type: ignore[arg-type]
    told = torch.randn(3, 2, 4, 4).double(), torch.tensor([0.1, 0.5, 0.9]).double(), {"label": torch.arange(3)}
    judged = critic.through(teacher)
    answers, slopes = judged(*told, slopes=True)
    assert all(torch.equal(one, other) for one, other in zip(answers, judged(*told), strict=True))
    with critic.at_work():
        teacher(*told)
    features = [one.requires_grad_() for one in critic._taken()]
    found = torch.zeros(3).double()
    for head, one in zip(critic.heads, features, strict=True):
        (gradient,) = torch.autograd.grad(head(one).sum(), one)
        step = 1e-6 * gradient
        found += ((head(one + step) - head(one - step)) / 2e-6).sum(1)
    torch.testing.assert_close(slopes, found, rtol=1e-6, atol=0)
    slopes.sum().backward()
    assert all(p.grad is not None for name, p in critic.named_parameters() if name.endswith("fc1.weight"))


def test_heads_read_pictures_features_too_and_what_cannot_be_is_said() -> None:
    critic = ProjectedCritic(base=unet, hidden_size=4)
    net = random(unet())
    random(critic)
    critic.attach(net)  # type: ignore[arg-type]
    answers = critic(torch.randn(2, 2, 4, 4), torch.tensor([0.1, 0.9]), {"text": torch.randn(2, 3, 8)})
    assert len(answers) == len(net.blocks()) and {one.shape[1] for one in answers} == {16, 4}  # type: ignore[operator]
    with pytest.raises(UserError, match=r"objective\.student_steps: got 0"):
        AdversarialDistillation(student_steps=0)
    with pytest.raises(UserError, match="and r1_weight -1"):
        AdversarialDistillation(r1_weight=-1)
    with pytest.raises(ValueError, match="the critic is for UNetCondition; the base is a DiT"):
        critic.attach(base())
