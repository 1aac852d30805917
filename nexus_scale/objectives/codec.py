"""Training a codec of waveforms against discriminators: two phases, two networks.

Source: Défossez et al. 2022 (EnCodec), section 3.4; Zeghidour et al. 2021 (SoundStream), bitrate scalability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    SumOverRanks,
    UserError,
)
from nexus_scale.objectives.gradient_balance import Balancer
from nexus_scale.objectives.mel import mel_distance

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class Seen(NamedTuple):
    """The codebooks' training data of a micro-batch: latents (B, D, T'), codes (B, T', K'), positions (B,)."""

    latents: Tensor
    codes: Tensor
    positions: Tensor


class Codec(Objective):
    """Phase `generator` trains `model`: `model(x, num_books) -> (x_hat, latents, codes, commitment)`, with a `quantizer` whose
    `follow` moves its books (None: it has none, as a vocoder); phase `discriminator` trains `discriminator`: `discriminator(x) -> (logits,
    features) a scale`.
    Shared draws: `books`, `replacement`.

    Losses of x_hat: `time`, mean absolute difference of waveforms; `mel`, see `mel_distance`; `adversarial`, the hinge
    max(0, 1 - logits); `features`, absolute differences of the discriminator's features relative to their mean size. They are
    balanced by their gradients at x_hat; the commitment is added as it is. The first step measures gradients and latents, for
    the balance and for the books to begin with, and moves no weight.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 24000,
        time_weight: float = 0.1,
        mel_weight: float = 1.0,
        adversarial_weight: float = 3.0,
        feature_weight: float = 3.0,
        commitment_weight: float = 1.0,
        mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
        num_mels: int = 64,
        balanced: bool = True,
        balance_decay: float = 0.999,
        total_norm: float = 1.0,
        book_choices: tuple[int, ...] | None = None,
        books_begin: int = 0,
        discriminator_begins: int = 0,
        discriminator_steps: tuple[int, int] = (2, 3),
    ):
        """
        Args:
            sample_rate_hz: of the waveforms.
            time_weight, mel_weight, adversarial_weight, feature_weight: of each loss; EnCodec's for 24 kHz.
            commitment_weight: of the latents' distance from their codes.
            mel_windows, num_mels: of the spectrograms, in samples and bins.
            balanced: weights are shares of the gradient; otherwise factors of the losses.
            balance_decay, total_norm: see `Balancer`. The commitment weighs against total_norm.
            book_choices: numbers of books of which each step draws one, for bit rates to choose from later; None: all books.
            books_begin: steps in which latents pass unquantised. Where the rate is high at once, latents move further in a step than
                they differ, and books that follow them have one entry in use.
            discriminator_begins: steps without discriminator and its losses.
            discriminator_steps: (a, b): from then on it learns in the first a of every b steps. EnCodec draws with probability 2/3.
        """
        weights = {
            "time": time_weight,
            "mel": mel_weight,
            "adversarial": adversarial_weight,
            "features": feature_weight,
        }
        for name, value in {**weights, "commitment": commitment_weight, "total_norm": total_norm}.items():
            if value < 0:
                raise UserError(f"objective: the weight of {name} is {value}; expected 0 or more")
        if time_weight + mel_weight <= 0:
            raise UserError("objective: time_weight and mel_weight are both 0; set at least one above 0")
        if not mel_windows or any(window < 16 or window % 4 for window in mel_windows):
            raise UserError(f"objective.mel_windows: got {mel_windows}; expected multiples of 4 from 16")
        if not 0 <= balance_decay < 1:
            raise UserError(f"objective.balance_decay: got {balance_decay}; expected a share in [0, 1)")
        if book_choices is not None and min(book_choices, default=0) < 1:
            raise UserError(f"objective.book_choices: got {book_choices}; expected numbers of books from 1")
        learns, of = discriminator_steps
        if not 1 <= learns <= of or min(discriminator_begins, books_begin) < 0:
            raise UserError(
                f"objective: got books_begin {books_begin}, discriminator_begins {discriminator_begins}, discriminator_steps "
                f"{discriminator_steps}; expected 0 or more of both, and (a, b) with 1 <= a <= b"
            )
        self.sample_rate_hz, self.weights, self.commitment_weight = sample_rate_hz, weights, commitment_weight
        self.mel_windows, self.num_mels, self.balanced = tuple(mel_windows), num_mels, balanced
        self.book_choices, self.books_begin = book_choices, books_begin
        self.discriminator_begins, self.discriminator_steps = discriminator_begins, (learns, of)
        self.balancer = Balancer(weights, decay=balance_decay, total_norm=total_norm)
        self._draw = -1  # the global batch of the two below
        self._seen: list[Seen] = []
        self._drawn: dict[tuple[int, int], Tensor] = {}

    @property
    def adversarial(self) -> bool:
        """Whether the objective has a discriminator."""
        return self.weights["adversarial"] + self.weights["features"] > 0

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "discriminator") if self.adversarial else ("model",)

    @property
    def fields(self) -> Sequence[str]:
        return ("audio",)

    def phases(self, step: int) -> Sequence[Phase]:
        phases = [Phase(GENERATOR, trains="model")]
        since = step - self.discriminator_begins
        if self.adversarial and since >= 0 and since % self.discriminator_steps[1] < self.discriminator_steps[0]:
            phases.append(Phase(DISCRIMINATOR, trains="discriminator", draws=False))
        return phases

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of `generator`: `loss` (as in `validate`), each loss by name, `commitment`; of
        `discriminator`: `loss`, and `real`, `fake`, the mean logits."""
        x = self._clean(batch)
        return self._generator(nets, x, batch, rng, step) if phase == GENERATOR else self._discriminator(nets, x, batch)

    # ------------------------------------------------------------------------------------------ phases

    def _generator(self, nets: Nets, x: Tensor, batch: Batch, rng: Rng, step: int) -> Loss:
        if batch.draw != self._draw:
            self._draw, self._seen, self._drawn = batch.draw, [], {}
        x_hat, own = self._coded(nets, x, batch, rng)
        self._drawn[_key(batch)] = x_hat.detach()
        time, mel = self._reconstruction(x, x_hat)
        losses = {"time": time.mean(), "mel": mel.mean()}
        if self.adversarial and step >= self.discriminator_begins:
            with torch.no_grad():
                real = nets["discriminator"](x)
            losses |= adversarial_losses(real, nets["discriminator"](x_hat))
        if self.balanced:
            # The product has the balanced gradient at x_hat; its value is meaningless.
            total = (x_hat * self.balancer.gradient(losses, x_hat)).sum()
        else:
            total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        for weight, loss in own.values():
            total = total + weight * loss
        metrics = {"loss": self._total(time, mel).mean(), **{name: loss for name, (_, loss) in own.items()}, **losses}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def _coded(self, nets: Nets, x: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        """What the codec makes of waveforms, and its losses beside those of that, by name, each with its weight."""
        x_hat, latents, codes, commitment = nets["model"](x, self._num_books(rng))
        self._seen.append(Seen(latents.detach(), codes, batch.positions))
        return x_hat, {"commitment": (self.commitment_weight, commitment.mean())}

    def _discriminator(self, nets: Nets, x: Tensor, batch: Batch) -> Loss:
        """Real and coded waveforms in one pass; the coded ones are those of this step's generator phase."""
        judged = nets["discriminator"](torch.cat([x, self._drawn[_key(batch)]]))
        real, fake = zip(*(scale.logits.float().chunk(2) for scale in judged), strict=True)
        hinges = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
        total = torch.stack(hinges).mean()
        means = {
            name: torch.stack([logits.mean() for logits in scales]).mean()
            for name, scales in (("real", real), ("fake", fake))
        }
        return Loss(total, {name: value.detach() for name, value in {"loss": total, **means}.items()})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """Books and balance follow the global batch. Metrics: `perplexity` of the codes, part of the entries that was `replaced`."""
        if phase != GENERATOR:
            return {}
        if self.balanced:
            self.balancer.follow(sum_over_ranks)
        seen, self._seen = self._seen, []
        quantizer: Any = nets["model"].quantizer
        if step < self.books_begin or quantizer is None:
            return {}
        metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = quantizer.follow(
            seen, sum_over_ranks, rng.shared("replacement")
        )
        return metrics

    # ------------------------------------------------------------------------------------------ validation

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """With all books: `loss` = (time_weight * time + mel_weight * mel) / (sum of the two weights), `loss_zero` of silence, `time`,
        `mel`, `si_snr` in dB; each (B,)."""
        x = self._clean(batch)
        x_hat = nets["model"](x)[0].float()
        time, mel = self._reconstruction(x, x_hat)
        zero = self._total(*self._reconstruction(x, torch.zeros_like(x)))
        return {"loss": self._total(time, mel), "loss_zero": zero, "time": time, "mel": mel, "si_snr": si_snr(x, x_hat)}

    # ------------------------------------------------------------------------------------------ generation

    @property
    def draws(self) -> Draws:
        return Draws("audio", given=("audio",), sample_rate_hz=self.sample_rate_hz)

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        x = self._clean(batch)
        return {}, replace(request, shape=tuple(x.shape[1:]), given={"audio": x})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The given waveforms, coded and decoded with all books: (B, C, T) in [-1, 1]."""
        x_hat: Tensor = nets["model"](request.given["audio"])[0]
        return Generated(x_hat.float().clamp(-1, 1))

    # ------------------------------------------------------------------------------------------ terms

    def _clean(self, batch: Batch) -> Tensor:
        x = batch["audio"]
        if x.ndim != 3 or not x.is_floating_point():
            raise UserError(
                f"field audio: got {x.dtype} of shape {tuple(x.shape)}; expected floats (B, C, T) in [-1, 1]: cut clips into "
                "segments of one length",
                code=3,
            )
        longest = max(self.mel_windows)
        if x.shape[2] <= longest // 2:
            raise UserError(
                f"segments of {x.shape[2]} samples are too short for objective.mel_windows, whose longest is {longest}; expected "
                f"more than {longest // 2}"
            )
        return x.float()

    def _num_books(self, rng: Rng) -> int | None:
        if self.book_choices is None:
            return None
        drawn = torch.randint(len(self.book_choices), (1,), generator=rng.shared("books"))
        return self.book_choices[int(drawn)]

    def _reconstruction(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Per sample: mean absolute difference of the waveforms, distance of their mel spectrograms."""
        x_hat = x_hat.float()
        return (x_hat - x).abs().flatten(1).mean(1), mel_distance(
            x_hat, x, self.sample_rate_hz, self.mel_windows, self.num_mels
        )

    def _total(self, time: Tensor, mel: Tensor) -> Tensor:
        weights = self.weights["time"] + self.weights["mel"]
        return (self.weights["time"] * time + self.weights["mel"] * mel) / weights

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        return self.balancer.state_dict() if self.balanced else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the codec's state is {sorted(self.state_dict())}; got {sorted(state)}")
        if self.balanced:
            self.balancer.load_state_dict(state)


def adversarial_losses(real: Sequence[Any], fake: Sequence[Any]) -> dict[str, Tensor]:
    """`adversarial` and `features` from a discriminator's outputs for real and coded waveforms, means over scales and layers."""
    hinges, differences = [], []
    for of_real, of_fake in zip(real, fake, strict=True):
        hinges.append(F.relu(1 - of_fake.logits.float()).mean())
        for feature, feature_hat in zip(of_real.features, of_fake.features, strict=True):
            size = (
                feature.float().abs().flatten(1).mean(1)
            )  # of each sample: a micro-batch's own would depend on its size
            difference = (feature.float() - feature_hat.float()).abs().flatten(1).mean(1)
            differences.append((difference / size.clamp(min=1e-12)).mean())
    return {"adversarial": torch.stack(hinges).mean(), "features": torch.stack(differences).mean()}


def si_snr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Scale-invariant signal-to-noise ratio of x_hat against x (B, C, T), in dB, (B,).

    Source: Le Roux et al. 2019, "SDR - half-baked or well done?".
    """
    x, x_hat = (wave.flatten(1) - wave.flatten(1).mean(1, keepdim=True) for wave in (x, x_hat))
    along = (x_hat * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp(min=1e-12) * x
    ratio = along.square().sum(1) / (x_hat - along).square().sum(1).clamp(min=1e-12)
    return 10 * torch.log10(ratio.clamp(min=1e-12))


def _key(batch: Batch) -> tuple[int, int]:
    return batch.draw, int(batch.positions[0])
