"""Training a codec that keeps the attributes of speech apart: reconstruction against discriminators, and questions to each attribute.

Source: Ju et al. 2024, "NaturalSpeech 3", section 3.2; what is computed is as in Amphion's ns3_codec, the default weights are those of
its egs/codec/FAcodec, since the paper's are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Generated, Nets, Request, Rng, SumOverRanks, UserError
from nexus_scale.objectives.codec import GENERATOR, Codec, Seen

Weight = Annotated[float, Field(ge=0)]


class FACodec(Codec):
    """Phase `generator` trains `model`: `model(x, shown) -> Factored` (models/audio/factorised.py), phase `discriminator` the
    `discriminator`, as for `Codec`, with its losses. Draws: `detail`.

    Beside them: `commitment` and `codebook`, of the books; `phones`, cross-entropy of each step's phone by the content; `f0`, the smooth
    absolute difference of pitch where there is one and the binary cross-entropy of whether there is, by the prosody; `speaker`,
    cross-entropy by the timbre; and the same questions to what must not answer them, whose gradients come back reversed. Each is a mean
    over a sample's steps, then over samples.

    A batch has `phones` (B, T') integers, -1 where none is known; `pitch` (B, T', 2), the logarithm of the pitch less the utterance's mean
    and 1 where there is one; `label` (B,), the speaker. T' are the codec's steps.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 16000,
        time_weight: float = 0.0,
        mel_weight: float = 15.0,
        adversarial_weight: float = 1.0,
        feature_weight: float = 1.0,
        commitment_weight: float = 0.25,
        codebook_weight: Weight = 1.0,
        phones_weight: Weight = 5.0,
        f0_weight: Weight = 1.0,
        speaker_weight: Weight = 5.0,
        reversed_weight: Weight = 1.0,
        pitch_std: Annotated[float, Field(gt=0)] = 1.0,
        detail_dropout: Annotated[float, Field(ge=0, le=1)] = 0.75,
        mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
        num_mels: int = 64,
        books_begin: int = 0,
        discriminator_begins: int = 0,
        discriminator_steps: tuple[int, int] = (1, 1),
    ):
        """
        Args:
            codebook_weight: of the entries' distance from the latents that they code.
            phones_weight, f0_weight, speaker_weight: of each question, to the attribute that is to answer it and to those that are not.
            reversed_weight: factor of the weights of questions behind reversed gradients.
            pitch_std: unit of `pitch`, in which its differences are to be of the order of 1: the logarithm of a voice's pitch varies by 0.1
                to 0.2, of which next to nothing is learnt beside whether there is a pitch.
            detail_dropout: probability that a sample is rebuilt without its detail, so that the rest does not lean on it.
            others: see `Codec`; losses are weighted, not balanced.
        """
        super().__init__(
            sample_rate_hz=sample_rate_hz,
            time_weight=time_weight,
            mel_weight=mel_weight,
            adversarial_weight=adversarial_weight,
            feature_weight=feature_weight,
            commitment_weight=commitment_weight,
            mel_windows=mel_windows,
            num_mels=num_mels,
            balanced=False,
            books_begin=books_begin,
            discriminator_begins=discriminator_begins,
            discriminator_steps=discriminator_steps,
        )
        self.codebook_weight, self.detail_dropout = codebook_weight, detail_dropout
        self.reversed_weight, self.pitch_std = reversed_weight, pitch_std
        self.question_weights = {"phones": phones_weight, "f0": f0_weight, "speaker": speaker_weight}
        self._used: list[Tensor] = []

    @property
    def fields(self) -> Sequence[str]:
        return ("audio", "phones", "pitch", "label")

    def _coded(self, nets: Nets, x: Tensor, batch: Batch, rng: Rng) -> tuple[Tensor, dict[str, tuple[float, Tensor]]]:
        shown = (rng.uniform("detail") >= self.detail_dropout).float()
        made = nets["model"](x, shown)
        if nets["model"].quantizer is None:
            self._used.append(_counts(made.parts.codes, nets["model"].codebook_size))
        else:
            self._seen.append(Seen(made.parts.low.detach(), made.parts.codes, batch.positions))
        losses = {
            "commitment": (self.commitment_weight, made.parts.commitment.mean()),
            "codebook": (self.codebook_weight, made.parts.codebook.mean()),
        }
        for name, (loss, _) in self._answers(made.told, batch).items():
            factor = 1.0 if name in self.question_weights else self.reversed_weight
            losses[name] = (factor * self.question_weights[_question(name)], loss.mean())
        return made.x_hat, losses

    def _answers(self, told: Mapping[str, Tensor], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each question by its name the loss, and how well it is answered, (B,) each."""
        found = {}
        for name, answer in told.items():
            question = _question(name)
            if question == "phones":
                found[name] = phone_errors(answer, self._steps(batch, "phones", answer))
            elif question == "f0":
                found[name] = pitch_errors(answer, self._steps(batch, "pitch", answer), self.pitch_std)
            else:
                logits, label = answer.float(), batch["label"]
                right = (logits.argmax(1) == label).float()
                found[name] = (F.cross_entropy(logits, label, reduction="none"), right)
        return found

    @staticmethod
    def _steps(batch: Batch, field: str, answer: Tensor) -> Tensor:
        value = batch[field]
        if value.shape[:2] != answer.shape[:2]:
            raise UserError(
                f"field {field}: got {tuple(value.shape)} for {answer.shape[1]} steps of the codec; make the labels with its hop: "
                "label_segments has `hop`",
                code=3,
            )
        return value

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """As `Codec.after_phase` where books follow what they code; where they learn by gradients, `perplexity` alone."""
        if phase != GENERATOR or nets["model"].quantizer is not None:
            return super().after_phase(phase, nets, sum_over_ranks, rng, step)
        used, self._used = self._used, []
        counts = sum_over_ranks(torch.stack(used).sum(0))  # (K, V)
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return {"perplexity": torch.special.entr(shares).sum(-1).exp().mean()}

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """As `Codec.validate`, with all detail. And of each question `<name>_loss`, and how well it is answered: the share of phones and
        speakers, and the correlation of pitch, found right."""
        x = self._clean(batch)
        made = nets["model"](x)
        answers = self._answers(made.told, batch)
        figures = {f"{name}_loss": loss for name, (loss, _) in answers.items()}
        figures |= {f"{name}_right": right for name, (_, right) in answers.items()}
        return {**super().validate({**nets, "model": lambda _: (made.x_hat,)}, batch, rng), **figures}

    # ------------------------------------------------------------------------------------------- generation

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The given waveforms, coded and decoded: (B, 1, T) in [-1, 1]. `request.given` may have `timbre` (B, 1, T'), waveforms of the
        voices in which they are decoded, and `prosody` (B, 1, T), waveforms whose prosody they take."""
        model: Any = nets["model"]
        x = request.given["audio"]
        codes, K = model.encode(x), model.attributes.prosody_books
        if "prosody" in request.given:
            codes = torch.cat([model.encode(request.given["prosody"])[..., :K], codes[..., K:]], dim=2)
        x_hat: Tensor = model.decode(codes, model.voice(request.given.get("timbre", x)))[..., : x.shape[-1]]
        return Generated(x_hat.float().clamp(-1, 1))


def _question(name: str) -> str:
    """What is asked: `detail_phones` is asked for phones, `timbre` behind a reversed gradient for the speaker."""
    return "speaker" if name == "timbre" else name.rpartition("_")[2]


def _counts(codes: Tensor, size: int) -> Tensor:
    """How often each entry is used, (B, T, K) -> (K, V)."""
    return F.one_hot(codes.flatten(0, 1), size).float().sum(0)


def phone_errors(logits: Tensor, phones: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats and the share of phones found, over the steps whose phone is known: logits (B, T, P), phones (B, T), -1 where
    unknown -> (B,) each; 0 where none is."""
    logits, known = logits.float(), phones >= 0
    nats = F.cross_entropy(logits.transpose(1, 2), phones.clamp(min=0), reduction="none")
    count = known.sum(1).clamp(min=1)
    right = (logits.argmax(2) == phones) & known
    return torch.where(known, nats, 0.0).sum(1) / count, right.sum(1) / count


def pitch_errors(answer: Tensor, pitch: Tensor, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """Smooth absolute difference of pitch, in units of `std`, over the steps that have one, plus the binary cross-entropy of whether they
    do; and the correlation with the pitch: answer (B, T, 2), pitch (B, T, 2) -> (B,) each; the correlation is 0 where nothing varies."""
    said, wanted, voiced = answer[..., 0].float(), pitch[..., 0] / std, pitch[..., 1]
    count = voiced.sum(1).clamp(min=1)
    loss = (F.smooth_l1_loss(said, wanted, reduction="none") * voiced).sum(1) / count
    loss = loss + F.binary_cross_entropy_with_logits(answer[..., 1].float(), voiced, reduction="none").mean(1)
    one, other = (
        (value - ((value * voiced).sum(1) / count)[:, None]) * voiced for value in (said, wanted)
    )  # deviations where there is a pitch
    size = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return loss, torch.where(size > 1e-8, (one * other).sum(1) / size.clamp(min=1e-8), 0.0)
