"""The codec's parts alone: books that follow latents, the balance of losses, what a discriminator is told, wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config.registry import find
from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.kernels import transfer
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.audio.codec import Codec
from nexus_scale.models.audio.quantization import ResidualQuantizer, Seen, nearest
from nexus_scale.models.gan.ms_stft_discriminator import MSSTFTDiscriminator
from nexus_scale.models.layers.weight_normed import Conv1d
from nexus_scale.objectives.codec import Codec as CodecObjective
from nexus_scale.objectives.codec import adversarial_losses, si_snr
from nexus_scale.objectives.gradient_balance import Balancer
from nexus_scale.objectives.mel import mel_distance, mel_filters, mel_spectrogram

SMALL: dict[str, Any] = {
    "sample_rate_hz": 8000,
    "strides": (2, 4),
    "base_channels": 4,
    "latent_channels": 6,
    "lstm_layers": 1,
    "num_codebooks": 3,
    "codebook_size": 8,
    "kmeans_iterations": 3,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(**changes: Any) -> Codec:
    torch.manual_seed(0)
    net = Codec(**(SMALL | changes))
    net.init_weights()
    return net


def alone(value: Tensor) -> Tensor:
    return value.clone()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(**changes: Any) -> ResidualQuantizer:
    arguments: dict[str, Any] = {
        "num_codebooks": 2, "codebook_size": 4, "dim": 3, "decay": 0.5, "dead_below": 0.0, "kmeans_iterations": 4,
    }  # fmt: skip
    return ResidualQuantizer(**(arguments | changes))


def seen(books: ResidualQuantizer, latents: Tensor) -> list[Seen]:
    return [Seen(latents, books.encode(latents), torch.arange(len(latents)))]


# ---------------------------------------------------------------------------------------------- books


def clusters(spread: float = 0.01) -> Tensor:
    """Latents around four points, (5, 3, 8)."""
    points = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]])
    chosen = points[torch.arange(40) % 4] + spread * torch.randn(40, 3, generator=generator())
    return chosen.view(5, 8, 3).transpose(1, 2)


def test_before_the_first_step_latents_pass_and_then_books_lie_where_they_are() -> None:
    books, z = quantizer(), clusters()
    passed = books(z)
    assert torch.equal(passed.latents, z) and passed.commitment.abs().max() == 0
    metrics = books.follow(seen(books, z), alone, generator())
    assert float(metrics["perplexity"]) > 2
    assert bool(books.initialised > 0)
    # four clusters, four entries: each finds its own, whatever entries it began with, up to empty ones
    found = books(z)
    assert found.commitment.mean() < 0.05
    assert torch.allclose(found.latents, books.decode(found.codes), atol=1e-6)
    # an entry of the first book is the mean of the latents that chose it
    rows, codes = z.transpose(1, 2).flatten(0, 1), found.codes[..., 0].flatten()
    for code in codes.unique():
        torch.testing.assert_close(books.codebooks[0, code], rows[codes == code].mean(0), atol=1e-5, rtol=0)


def test_books_are_moving_averages_of_what_chose_their_entries() -> None:
    books = quantizer(num_codebooks=1)
    books.follow(seen(books, clusters()), alone, generator())
    size, total = books.cluster_size.clone(), books.cluster_sum.clone()
    z = clusters() + 0.1
    codes = books.encode(z)[..., 0].flatten()
    rows = z.transpose(1, 2).flatten(0, 1)
    books.follow(seen(books, z), alone, generator(1))
    for code in range(4):
        mine = rows[codes == code]
        torch.testing.assert_close(books.cluster_size[0, code], 0.5 * size[0, code] + 0.5 * len(mine))
        torch.testing.assert_close(books.cluster_sum[0, code], 0.5 * total[0, code] + 0.5 * mine.sum(0))
        if len(mine) > 1:
            expected = books.cluster_sum[0, code] / books.cluster_size[0, code]
            torch.testing.assert_close(books.codebooks[0, code], expected, atol=1e-4, rtol=1e-4)


def test_dead_entries_move_to_latents_of_the_batch_by_the_generator_alone() -> None:
    def moved(seed: int) -> Tensor:
        books = quantizer(num_codebooks=1, dead_below=1.0)
        books.follow(seen(books, clusters()), alone, generator())
        books.codebooks[0, 2] = 100.0
        books.cluster_size[0, 2] = 0.5
        torch.manual_seed(seed)  # torch's own generator has no say
        metrics = books.follow(seen(books, clusters()), alone, generator(7))
        assert float(metrics["replaced"][0]) >= 0.25
        assert float(books.cluster_size[0, 2]) == 1.0
        return books.codebooks[0, 2].clone()

    entry = moved(1)
    rows = clusters().transpose(1, 2).flatten(0, 1)
    assert (rows == entry).all(1).any(), "it is one of the latents"
    assert torch.equal(entry, moved(2))
    kept = quantizer(num_codebooks=1, dead_below=0.0)
    kept.follow(seen(kept, clusters()), alone, generator())
    kept.cluster_size[0, 2] = 0.0
    assert float(kept.follow(seen(kept, clusters()), alone, generator(7))["replaced"][0]) == 0


def test_where_reading_is_waiting_the_same_comes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is read, so all is computed and then left out."""

    def learned(freely: bool) -> tuple[dict[str, Tensor], list[float]]:
        monkeypatch.setattr(transfer, "reads_freely", lambda device: freely)
        books, said = quantizer(dead_below=8.0), []
        for step in range(5):
            z = clusters(spread=0.3) + 0.1 * step
            if step == 3:
                z[0, 0, 0] = float("nan")
            metrics = books.follow(seen(books, z), alone, generator(step))
            pairs = [value if isinstance(value, tuple) else (value, 1.0) for value in metrics.values()]
            said += [float(total) for total, count in pairs if float(count)]
        return dict(books.named_buffers()), said

    (there, figures), (here, expected) = learned(False), learned(True)
    assert figures == expected and 0 < max(expected[3::2]) < 1, "some entries were replaced"
    assert all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.parametrize("begun", [False, True])
def test_latents_that_are_not_finite_teach_nothing(begun: bool) -> None:
    books = quantizer(dead_below=2.0)
    if begun:
        books.follow(seen(books, clusters()), alone, generator())
    before = {name: buffer.clone() for name, buffer in books.named_buffers()}
    poisoned = clusters()
    poisoned[0, 0, 0] = float("nan")
    assert books.follow(seen(books, poisoned), alone, generator()) == {}
    if begun:
        assert all(torch.equal(buffer, before[name]) for name, buffer in books.named_buffers())
    assert bool(books.initialised > 0) == begun


def test_gradients_pass_straight_through_and_commitment_pulls_latents_to_their_entries() -> None:
    books = quantizer()
    books.follow(seen(books, clusters()), alone, generator())
    z = (clusters() + 0.2).requires_grad_()
    out = books(z)
    direction = torch.randn(z.shape, generator=generator(3))
    (gradient,) = torch.autograd.grad((out.latents * direction).sum(), z, retain_graph=True)
    assert torch.equal(gradient, direction)
    (gradient,) = torch.autograd.grad(out.commitment.sum(), z)
    assert books(z.detach() - 0.5 * len(gradient[0].flatten()) * gradient).commitment.mean() < out.commitment.mean()


def test_each_book_codes_what_the_books_before_it_left() -> None:
    net = make()
    x = torch.randn(4, 1, 512, generator=generator()) * 0.3
    net.quantizer.follow([Seen(net(x).latents.detach(), net(x).codes, torch.arange(4))], alone, generator())
    net.eval()
    with torch.no_grad():
        z = net.encoder(x)
        errors = [float((net.quantizer(z, n).latents - z).square().mean()) for n in (1, 2, 3)]
        assert errors[0] > errors[1] > errors[2] > 0
        codes = net.encode(x)
        assert torch.equal(codes[..., :2], net.encode(x, 2))
        rest = z.transpose(1, 2) - net.quantizer.codebooks[0][codes[..., 0]]
        assert torch.equal(codes[..., 1], nearest(rest, net.quantizer.codebooks[1]))
        assert torch.allclose(net.decode(codes)[..., :512], net(x).x_hat, atol=1e-6)


# ---------------------------------------------------------------------------------------------- network


def test_nothing_looks_ahead_and_any_length_is_coded() -> None:
    net = make().double().eval()
    x = torch.randn(1, 1, 400, dtype=torch.float64, generator=generator())
    other = x.clone()
    other[..., 200:] = 0.5
    with torch.no_grad():
        z, z_other = net.encoder(x), net.encoder(other)
        assert torch.allclose(z[..., :25], z_other[..., :25], atol=1e-12) and not torch.allclose(z, z_other)
        y, y_other = net.decoder(z), net.decoder(z_other)
        assert torch.allclose(y[..., :200], y_other[..., :200], atol=1e-12)
        for samples in (1, 7, 8, 9, 401):
            codes = net.encode(x.repeat(1, 1, 2)[..., :samples])
            assert codes.shape == (1, -(-samples // 8), 3)
            assert net.decode(codes).shape == (1, 1, 8 * codes.shape[1])
    both_ways = make(causal=False).double().eval()
    with torch.no_grad():
        assert not torch.allclose(both_ways.encoder(x)[..., :25], both_ways.encoder(other)[..., :25], atol=1e-6)


def test_initialised_every_parameter_learns_and_checkpointing_computes_the_same() -> None:
    assert find("models", "codec") is Codec and find("models", "ms_stft_discriminator") is MSSTFTDiscriminator
    gradients = []
    for checkpointing in (False, True):
        net = make().train()
        prepare_blocks(net, "codec", activation_checkpointing=checkpointing, compiled=False)
        out = net(torch.randn(2, 1, 256, generator=generator()))
        assert out.x_hat.isfinite().all() and out.x_hat.std() > 1e-4
        out.x_hat.square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_normed_kernel_has_its_gain_as_its_length() -> None:
    conv = Conv1d(3, 5, 4)
    torch.manual_seed(0)
    conv.init_weights()
    drawn = conv.direction.detach().clone()
    torch.testing.assert_close(conv.kernel(), drawn)
    with torch.no_grad():
        conv.direction.mul_(7)
        torch.testing.assert_close(conv.kernel(), drawn)
        conv.gain.mul_(2)
    torch.testing.assert_close(conv.kernel(), 2 * drawn)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strides": ()}, r"codec\.strides: got 0"),
        ({"compress": 8}, "compress: 8 leaves no channel"),
        ({"codebook_decay": 1.0}, r"codebook_decay: got 1\.0; expected a share in \[0, 1\)"),
        ({"codebook_size": 1}, "codebook_size 1"),
        ({"causal": False, "trim_right": 0.5}, "only to causal networks"),
        ({"num_codebooks": 0}, r"num_codebooks: got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Codec(**(SMALL | changes))


def test_wrong_input_is_refused() -> None:
    net = make()
    with pytest.raises(ValueError, match=r"shape \(1, 2, 64\); expected \(B, 1, T\)"):
        net(torch.zeros(1, 2, 64))
    with pytest.raises(ValueError, match="num_books 4; expected 1 to 3"):
        net.encode(torch.zeros(1, 1, 64), 4)
    with pytest.raises(ValueError, match=r"expected \(B, T, K\) with K of 1\.\.3"):
        net.decode(torch.zeros(1, 5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes in 0\.\.8; expected 0\.\.7"):
        net.decode(torch.arange(9).view(1, 9, 1))
    with pytest.raises(ValueError, match="T of at least 128"):
        MSSTFTDiscriminator(base_channels=2, windows=(128, 64))(torch.zeros(1, 1, 100))
    with pytest.raises(UserError, match="multiples of 4 from 16"):
        MSSTFTDiscriminator(windows=(100, 30))


# ---------------------------------------------------------------------------------------------- losses


def test_mel_filters_add_up_to_one_between_the_first_and_the_last_corner() -> None:
    filters = mel_filters(16000, 1024, 40)
    assert filters.shape == (40, 513) and filters.min() >= 0
    inside = filters.sum(0)[int(filters[0].argmax()) : int(filters[-1].argmax())]
    torch.testing.assert_close(inside, torch.ones_like(inside), atol=1e-5, rtol=0)
    centres = filters.argmax(1)
    assert (centres[1:] > centres[:-1]).all() and (centres[20:] - centres[19:-1]).float().mean() > 5


def test_a_tone_lies_in_the_filter_of_its_frequency() -> None:
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 16000).view(1, 1, -1)
    spectrogram = mel_spectrogram(tone, 16000, 512)
    assert spectrogram.shape[1:3] == (1, 64)
    loudest = int(spectrogram[0, 0, :, 30].argmax())
    frequencies = torch.linspace(0, 8000, 257)
    filters = mel_filters(16000, 512, 64)
    assert abs(float(frequencies[filters[loudest].argmax()]) - 1000) < 60
    assert mel_spectrogram(tone, 16000, 32).shape[2] < 32, "filters that fall between two frequencies are left out"


def test_mel_distance_is_zero_of_the_same_per_sample_and_has_no_gradient_of_rounding() -> None:
    x = torch.randn(3, 1, 2048, generator=generator()) * 0.1
    y = x.clone()
    y[1] *= 0.5
    found = mel_distance(x, y, 16000, (256, 512))
    assert found[0] == found[2] == 0 and found[1] > 0.05
    torch.testing.assert_close(found[1:2], mel_distance(x[1:2], y[1:2], 16000, (256, 512)))
    smooth = torch.sin(2 * torch.pi * 100 * torch.arange(2048) / 16000).view(1, 1, -1)
    gradients = []
    for noise in (0.0, 1e-7):
        leaf = (smooth + noise * torch.randn(smooth.shape, generator=generator(1))).requires_grad_()
        mel_distance(leaf, x[:1], 16000, (256, 512)).sum().backward()
        gradients.append(leaf.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-2


def test_the_balance_gives_each_loss_its_share_whatever_its_scale() -> None:
    balancer = Balancer({"a": 1.0, "b": 3.0}, decay=0.9, total_norm=2.0)
    output = torch.randn(4, 5, generator=generator()).requires_grad_()
    target = torch.randn(4, 5, generator=generator(1))

    def losses() -> dict[str, Tensor]:
        return {"a": 1e-4 * (output - target).square().mean(), "b": 1e4 * output.sin().mean()}

    assert balancer.gradient(losses(), output).abs().max() == 0, "the first step measures"
    balancer.follow(alone)
    total = balancer.gradient(losses(), output)
    parts = {name: torch.autograd.grad(loss, output)[0] for name, loss in losses().items()}
    shares = {name: balancer.weights[name] / 4 * 2.0 / norm for name, norm in balancer.averages().items()}
    torch.testing.assert_close(total, sum(parts[name] * float(shares[name]) for name in parts))
    for name, share in (("a", 0.25), ("b", 0.75)):
        mean_norm = (parts[name] * float(shares[name]) * 4).norm(dim=1).mean()
        assert float(mean_norm) == pytest.approx(2.0 * share, rel=1e-5)


def test_the_balance_keeps_an_unbiased_average_and_leaves_out_what_it_has_not_measured() -> None:
    balancer = Balancer({"a": 1.0, "late": 1.0}, decay=0.5)
    output = torch.ones(2, 3).requires_grad_()
    for scale in (1.0, 3.0):
        balancer.gradient({"a": scale * output.sum(1).mean()}, output)
        balancer.follow(alone)
    expected = 3**0.5 * (0.5 * 1 + 3) / 1.5
    assert float(balancer.averages()["a"]) == pytest.approx(expected) and list(balancer.averages()) == ["a"]
    both = {"a": output.sum(1).mean(), "late": (output**2).sum(1).mean()}
    only_a = balancer.gradient(both, output)
    torch.testing.assert_close(only_a, torch.full((2, 3), 0.5 / expected))
    again = Balancer({"a": 1.0, "late": 1.0}, decay=0.5)
    again.load_state_dict(balancer.state_dict())
    assert again.averages() == balancer.averages()
    balancer.gradient({"a": float("nan") * output.sum()}, output)
    balancer.follow(alone)
    assert float(balancer.averages()["a"]) == pytest.approx(expected), "what is not finite is not taken in"


def test_adversarial_losses_are_hinges_and_relative_features() -> None:
    torch.manual_seed(0)
    net = MSSTFTDiscriminator(base_channels=2, windows=(128, 64))
    net.init_weights()
    x = torch.randn(2, 1, 512)
    real = net(x)
    same = adversarial_losses(real, net(x))
    assert same["features"].item() == 0
    hinge = sum((1 - scale.logits).clamp(min=0).mean() for scale in real) / 2
    torch.testing.assert_close(same["adversarial"], hinge)
    other = net(torch.randn(2, 1, 512))
    expected = [
        ((a - b).abs().flatten(1).mean(1) / a.abs().flatten(1).mean(1)).mean()
        for one, two in zip(real, other, strict=True)
        for a, b in zip(one.features, two.features, strict=True)
    ]
    torch.testing.assert_close(adversarial_losses(real, other)["features"], torch.stack(expected).mean())
    assert len(expected) == 10


def objective(**changes: Any) -> CodecObjective:
    arguments: dict[str, Any] = {"sample_rate_hz": 8000, "mel_windows": (64, 256)}
    return CodecObjective(**(arguments | changes))


def nets() -> dict[str, Any]:
    discriminator = MSSTFTDiscriminator(base_channels=2, windows=(128, 64))
    torch.manual_seed(1)
    discriminator.init_weights()
    return {"model": make(), "discriminator": discriminator}


def batch_of(audio: Tensor, draw: int = 0) -> tuple[Batch, ProgressRng]:
    positions = torch.arange(len(audio))
    return Batch({"audio": audio}, positions, positions, draw), ProgressRng(0, draw, "generator", positions)


def test_phases_are_a_function_of_the_step() -> None:
    schedule = objective(discriminator_begins=2, discriminator_steps=(2, 3))
    named = [[phase.name for phase in schedule.phases(step)] for step in range(8)]
    assert [len(names) for names in named] == [1, 1, 2, 2, 1, 2, 2, 1]
    assert named[2] == ["generator", "discriminator"]
    generator_phase, discriminator_phase = schedule.phases(2)
    assert generator_phase.draws and not discriminator_phase.draws, "both learn from one batch"
    plain = objective(adversarial_weight=0, feature_weight=0)
    assert plain.needs == ("model",) and len(plain.phases(100)) == 1


def test_the_generator_learns_from_the_balanced_gradient_and_the_discriminator_tells_real_from_coded() -> None:
    both, loss = nets(), objective()
    audio = torch.randn(4, 1, 512, generator=generator()) * 0.2
    for step in range(3):
        batch, rng = batch_of(audio, step)
        for net in both.values():
            net.zero_grad()
        both["discriminator"].requires_grad_(False)
        found = loss.loss("generator", both, batch, rng, step)
        found.total.backward()
        both["discriminator"].requires_grad_(True)
        norms = [float(p.grad.norm()) for p in both["model"].parameters()]
        assert all(norm == 0 for norm in norms) if step == 0 else sum(norm > 0 for norm in norms) == len(norms)
        assert all(p.grad is None for p in both["discriminator"].parameters())
        judged = loss.loss("discriminator", both, batch, rng, step)
        judged.total.backward()
        assert any(p.grad is not None and p.grad.norm() > 0 for p in both["discriminator"].parameters())
        assert float(judged.metrics["loss"]) == pytest.approx(2.0, abs=0.5)
        metrics = loss.after_phase("generator", both, alone, rng, step)
        assert loss.after_phase("discriminator", both, alone, rng, step) == {}
    assert {"loss", "commitment", "time", "mel", "adversarial", "features"} == set(found.metrics)
    assert set(metrics) == {"perplexity", "replaced"} and float(found.metrics["commitment"]) > 0


def test_books_begin_when_they_are_told_to() -> None:
    both, loss = nets(), objective(books_begin=2, adversarial_weight=0, feature_weight=0)
    audio = torch.randn(4, 1, 512, generator=generator()) * 0.2
    for step in range(4):
        batch, rng = batch_of(audio, step)
        found = loss.loss("generator", both, batch, rng, step)
        metrics = loss.after_phase("generator", both, alone, rng, step)
        assert (float(found.metrics["commitment"]) > 0) == (step == 3)
        assert bool(metrics) == (step >= 2)


def test_without_the_balance_weights_are_factors() -> None:
    both, loss = nets(), objective(balanced=False, commitment_weight=0.5)
    batch, rng = batch_of(torch.randn(4, 1, 512, generator=generator()) * 0.2)
    found = loss.loss("generator", both, batch, rng, 0)
    expected = sum(loss.weights[name] * float(found.metrics[name]) for name in loss.weights)
    assert found.total.item() == pytest.approx(expected + 0.5 * float(found.metrics["commitment"]), rel=1e-5)
    assert loss.state_dict() == {}


def test_book_choices_are_drawn_by_the_step_alike_for_all_positions() -> None:
    loss = objective(book_choices=(1, 3))
    drawn = []
    for step in range(12):
        both = [ProgressRng(0, step, "generator", torch.arange(4) + first) for first in (0, 4)]
        assert loss._num_books(both[0]) == loss._num_books(both[1])
        drawn.append(loss._num_books(both[0]))
    assert set(drawn) == {1, 3}


def test_validation_is_per_sample_and_silence_is_its_zero() -> None:
    both, loss = nets(), objective()
    audio = torch.randn(3, 1, 512, generator=generator()) * 0.2
    audio[2] = 0
    batch, rng = batch_of(audio)
    with torch.no_grad():
        found = loss.validate(both, batch, rng)
        one, rng = batch_of(audio[1:2])
        torch.testing.assert_close(loss.validate(both, one, rng)["loss"], found["loss"][1:2], rtol=1e-5, atol=1e-6)
    assert set(found) == {"loss", "loss_zero", "time", "mel", "si_snr"}
    assert all(value.shape == (3,) and value.isfinite().all() for value in found.values())
    assert found["loss_zero"][2] == 0 and found["loss_zero"][0] > 0.1
    shown = loss.generate(both, *loss.request_like(batch, Request()), rng).samples
    assert shown.shape == audio.shape and shown.abs().max() <= 1


def test_si_snr_does_not_see_scale_and_sees_noise() -> None:
    x = torch.randn(2, 1, 8000, generator=generator())
    noise = torch.randn(x.shape, generator=generator(1))
    torch.testing.assert_close(si_snr(x, 3 * (x + 0.1 * noise)), torch.full((2,), 20.0), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mel_windows": (100, 30)}, "multiples of 4"),
        ({"time_weight": 0, "mel_weight": 0}, "both 0"),
        ({"feature_weight": -1}, "weight of features is -1"),
        ({"book_choices": (0, 2)}, "numbers of books from 1"),
        ({"discriminator_steps": (3, 2)}, r"1 <= a <= b"),
        ({"balance_decay": 1.0}, "share in"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        objective(**changes)


def test_data_that_are_no_segments_are_refused() -> None:
    loss, both = objective(), nets()
    for audio, says in (
        (torch.zeros(2, 512), "cut clips into segments of one length"),
        (torch.zeros(2, 1, 512, dtype=torch.int64), "expected floats"),
        (torch.zeros(2, 1, 100), "more than 128"),
    ):
        batch, rng = batch_of(audio)
        with pytest.raises(UserError, match=says):
            loss.loss("generator", both, batch, rng, 0)
    with pytest.raises(ValueError, match="the codec's state"):
        loss.load_state_dict({"other": torch.zeros(1)})
