"""Denoising: the network gets x_t and t, and learns the recipe's target; covers diffusion and flow matching.

Source: Ho et al. 2020; Salimans & Ho 2022; Karras et al. 2022; Lipman et al. 2022; Esser et al. 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nexus_scale.contracts import (
    SIZES,
    Batch,
    Cond,
    Draws,
    Generated,
    Guidance,
    Loss,
    Nets,
    NoiseSampler,
    Objective,
    Phase,
    Predictor,
    Request,
    Rng,
    Sampler,
    Start,
    SumOverRanks,
    UserError,
    Word,
)
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.kernels.transfer import constant
from nexus_scale.objectives.answer_errors import Errors, by_time, sample_mean
from nexus_scale.objectives.conditions import (
    ConditionDrop,
    ConditionNoise,
    NoText,
    TextInStep,
    at_time,
    is_picture,
    null_condition,
    told,
)
from nexus_scale.processes.chains import Chain
from nexus_scale.processes.couplings import find_coupling
from nexus_scale.processes.distances import Squared, find_distance
from nexus_scale.processes.flow import bits_of, log_likelihood, straightness, velocity_of
from nexus_scale.processes.gaussian import TARGETS, add_noise, network_input, recover, target_of
from nexus_scale.processes.guidance import guide_batched, rescaled_to
from nexus_scale.processes.keeping import Keeping
from nexus_scale.processes.latents import LatentStats, normalise, sample_moments, split_moments
from nexus_scale.processes.paths import EDM, find_path
from nexus_scale.processes.pixels import mirrored, pixels_of, to_unit_range, were_bytes
from nexus_scale.processes.reverse import PIXEL, variational_term
from nexus_scale.processes.times import (
    ConstantShift,
    Discrete,
    Importance,
    Stratified,
    find_time_shift,
    find_times,
    shift_time,
)
from nexus_scale.processes.training import check_training
from nexus_scale.processes.weights import find_weight, weight_of

NUM_BUCKETS = 4
NUM_VALIDATION_TIMES = 8

CORNER = SIZES[1]
"""The condition that says where a sample lies in its image."""
LIGHT = "loss_mask"
"""An image that stands beside the data (`named` of their sources): errors count as much as it is light."""
MASK = "mask"
"""Given beside a sample that is drawn anew: where it is, (B, 1, h, w), 1; the rest of it is kept."""
EMBEDDED = "guidance"
"""The constant that passes the guidance scale to a distilled network."""


class Denoising(Objective):
    """One phase, one network `model`: the weighted error of the target at random times.

    Draws, by name: `posterior` (stored moments to latents), `noise`, `times`, `mirror`, `drop` (and `drop_<condition>` where
    conditions drop independently).
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] = "rectified_flow",
        target: str = "velocity",
        times: str | Mapping[str, Any] = "logit_normal",
        weight: str | Mapping[str, Any] = "constant",
        distance: str | Mapping[str, Any] = "squared",
        time_shift: float | Mapping[str, Any] = 1.0,
        condition_drop: float | Mapping[str, float] = 0.1,
        condition_noise: Mapping[str, float] | None = None,
        conditions: tuple[str, ...] = ("text", "pooled"),
        latent_conditions: tuple[str, ...] = (),
        constants: Mapping[str, float] | None = None,
        input: Literal["moments", "image"] = "moments",
        coupling: str | Mapping[str, Any] = "independent",
        mirror: bool = False,
        variance: Literal["fixed", "learned"] = "fixed",
        variational_weight: float = 1.0,
        null: Literal["zeros", "empty"] = "zeros",
        masked: bool = False,
        encoders: Mapping[str, str] | None = None,
        trains: tuple[str, ...] = ("model",),
        latents: LatentStats | None = None,
        no_text: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            path: a name of `processes.paths.PATHS` (rectified_flow, vp_cosine, gvp, ddpm_linear, scaled_linear, edm, ...), or
                {name: ..., arguments}.
            target: what the network predicts: eps, x0, v, velocity or edm.
            times: a name of `processes.times.TIMES`: uniform, discrete (DDPM's thousand steps), logit_normal, mode, log_normal (EDM's
                sigma), importance (more often where losses are large), or {name: ..., arguments}, such as
                {name: stratified, intervals: 64, of: discrete}.
            weight: of a sample's error by its signal-to-noise ratio, whatever the target: constant, min_snr, soft_min_snr, p2, edm or
                debiased, or {name: ..., arguments}; see `processes.weights`.
            distance: squared or pseudo_huber, or {name: ..., arguments}; see `processes.distances`.
            time_shift: towards noise for larger images, on paths whose t_max is 1: a number, or a rule by their size,
                {name: square_root (SD3) or exponential (FLUX), ...}; see processes.times.
            condition_drop: probability that a sample loses all its conditions; by name, each is lost independently, and
                names joined by + together (SD3 drops each text encoder in 46.4 % of the samples, with its pooled text).
            condition_noise: by name, the noise that training adds to embeddings; see `ConditionNoise`.
            conditions: batch fields given to the network; `<name>_mask` goes along where the loader gives it. Pictures among them, which
                sources call by a name (`named`), are given in [-1, 1]; what should be told always, as they are, is left out of
                `condition_drop` by name.
            latent_conditions: those of them that are stored as moments, of pictures that sources call by these names; the network is
                given their means, normalised as x0 is.
            constants: conditions that are one number for all samples, in training and in sampling, and are never dropped:
                {guidance: 3.5} for a network distilled to obey a guidance scale (FLUX.1-dev).
            input: the field that holds x0: `moments`, (B, 2C, ...) of a VAE's posterior, or `image`, in [-1, 1] or uint8. Moments
                that come with a mask are clips of many lengths, (B, F, 2C, H, W): the network gets `frame_mask` (B, F), and
                frames that are not real count for nothing.
            coupling: which noise goes with which data: independent, {name: optimal_transport, group: 64}, or `given` by the data, which
                are then `latents` and `noise` of `nexus generate --latents` (reflow); see processes.couplings.
            mirror: flip each training sample left to right with probability 1/2; latents then come with `moments_mirrored`
                (`mirror: true` of precompute_latents), since flipping a latent is not the latent of a flipped image.
            variance: `learned`: the network gives twice the channels (DiT's `learn_sigma`), and the second half learns the
                variance of a chain's reverse steps through their variational term, which teaches nothing else.
            variational_weight: of that term, in bits per value at the drawn step; 1 is Improved DDPM's 0.001 for the sum
                over 1000 steps, and DiT's.
            null: what stands for a text that is dropped, and what guidance leads away from: `zeros`, or the `empty` text as
                `data.encoders.text` gives it, which Stable Diffusion's published weights know.
            masked: errors of a sample count where the image `loss_mask` beside it is white; less where it is darker.
            encoders: of the conditions that networks of the recipe make of tokens in each step, these networks: {text: clip} reads
                `text_ids` among the conditions, which `ids: true` of data.encoders.text makes.
            trains: the networks that learn, with or without `model`.
            latents: mean and standard deviation per channel, from the manifest; given by the program.
            no_text: the empty text's conditions, (1, ...) each; given by the program.
        """
        self.path, self.target, self.times = find_path(path), target, find_times(times)
        self.weight = find_weight(weight, "objective.weight")
        self.distance_of = find_distance(distance, "objective.distance")
        check_training(self.path, target, self.times, self.weight)
        self.time_shift = find_time_shift(time_shift, "objective.time_shift")
        if self.time_shift != ConstantShift() and self.path.t_max != 1.0:
            raise UserError(f"objective.time_shift: got {time_shift} on {self.path}; expected 1 where t_max is not 1")
        if variance == "learned" and not isinstance(self.path, Chain):
            raise UserError(
                f"objective.variance: 'learned' needs a path whose steps are counted, such as 'ddpm_linear'; got {self.path}"
            )
        if variational_weight < 0:
            raise UserError(f"objective.variational_weight: got {variational_weight}; expected at least 0")
        self.no_text = NoText(no_text)
        self.empty_texts = [name for name in conditions if name not in (*SIZES, "label")] if null == "empty" else []
        self.condition_drop = ConditionDrop(condition_drop, conditions, self.no_text)
        self.condition_noise = ConditionNoise(condition_noise or {}, conditions)
        self.constants = dict(constants or {})
        if self.constants and (not conditions or set(self.constants) & set(conditions)):
            raise UserError(
                f"objective.constants: got {self.constants} beside conditions {list(conditions)}; expected at least one "
                "condition, and other names"
            )
        self.learns_variance, self.variational_weight = variance == "learned", variational_weight
        self.conditions, self.input, self.latents, self.mirror = tuple(conditions), input, latents, mirror
        self.latent_conditions = tuple(latent_conditions)
        if self.latent_conditions and (set(latent_conditions) - set(conditions) or input != "moments" or mirror):
            raise UserError(
                f"objective.latent_conditions: got {list(latent_conditions)} with input {input}, mirror {mirror}; expected some of the "
                f"conditions {list(conditions)} of moments that are not flipped, since a flipped latent is not that of a flipped picture"
            )
        self.encoders, self.trains = TextInStep(encoders or {}, conditions), trains
        if not trains or set(trains) - set(self.needs):
            raise UserError(f"objective.trains: got {list(trains)}; expected some of {list(self.needs)}")
        self.masked = masked
        if masked and (mirror or variance == "learned"):
            raise UserError(
                f"objective.masked: masks are not flipped, and weigh squared errors alone; got mirror {mirror}, variance {variance}: leave "
                "them out"
            )
        self.coupling = find_coupling(coupling)
        self.together = self.coupling.group
        if self.coupling.fields and mirror:
            raise UserError(
                "objective.mirror: pairs of a sample and its noise cannot be flipped; remove it, or coupling"
            )

    @property
    def needs(self) -> Sequence[str]:
        return ("model", *self.encoders.networks)

    @property
    def fields(self) -> Sequence[str]:
        flips = (f"{self.input}_mirrored",) if self.mirror and self.input != "image" else ()
        corner = (f"{CORNER}_mirrored",) if self._mirrors_corner else ()
        light = (LIGHT,) if self.masked else ()
        return (*(self.coupling.fields or (self.input, *flips)), *self.conditions, *corner, *light)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains=self.trains if len(self.trains) > 1 else self.trains[0]),)

    # -------------------------------------------------------------------------------------- a batch's parts

    def clean(self, batch: Batch, rng: Rng, flip: bool = False) -> Tensor:
        """x0 in model space, (B, C, ...) float32; with `flip` each sample is mirrored with probability 1/2."""
        stored = batch[self.input]
        if flip:
            mirrored = stored.flip(-1) if self.input == "image" else batch[f"{self.input}_mirrored"]
            chosen = rng.uniform("mirror") < 0.5
            stored = torch.where(chosen.view(-1, *[1] * (stored.ndim - 1)), mirrored, stored)
        if self.input == "image":
            return to_unit_range(stored, batch.dtype(self.input), self.input)
        if f"{self.input}_mask" in batch:
            stored = stored.transpose(1, 2)  # clips of many lengths, padded along their first axis: (B, F, 2C, H, W)
        shape = (stored.shape[1] // 2, *stored.shape[2:])
        return normalise(sample_moments(stored, rng.normal("posterior", shape)), self.latents)

    @property
    def _mirrors_corner(self) -> bool:
        return self.mirror and CORNER in self.conditions and not self.coupling.fields

    def told_of(self, batch: Batch, rng: Rng, train: bool) -> dict[str, Tensor]:
        """The conditions of a batch; of samples that `clean` has mirrored in training, where they lie in their mirrored image, pictures
        mirrored, and embeddings with noise."""
        cond = self.condition(batch)
        if train and self._mirrors_corner:
            chosen = rng.uniform("mirror") < 0.5  # (B,), as in `clean`
            cond[CORNER] = torch.where(chosen[:, None], batch[f"{CORNER}_mirrored"], cond[CORNER])
        if train and self.mirror:
            cond |= {name: mirrored(cond[name], rng) for name in self.conditions if is_picture(batch, name)}
        if self.masked:
            light = to_unit_range(batch[LIGHT], batch.dtype(LIGHT), LIGHT) / 2 + 0.5
            cond[LIGHT] = light.mean(1, keepdim=True)  # (B, 1, H, W)
        return self.condition_noise(cond, rng) if train else cond

    def pair(self, batch: Batch, rng: Rng, train: bool) -> tuple[Tensor, Tensor]:
        """x0 in model space and the noise that goes with it, each (B, C, ...) float32; in training some are mirrored."""
        if self.coupling.fields:
            x0, noise = (batch[name].float() for name in self.coupling.fields)
        else:
            x0 = self.clean(batch, rng, flip=train and self.mirror)
            noise = rng.normal("noise", x0.shape[1:])
        return x0, self.coupling.paired(x0, noise, rng.positions, whole=train)

    def condition(self, batch: Batch | Cond) -> dict[str, Tensor]:
        """The conditions of a batch (floats in float32) with the loader's masks, and the constants (B,)."""
        cond: dict[str, Tensor] = {}
        for name in self.conditions:
            cond |= told(batch, name)
        for name in self.latent_conditions:
            cond[name] = normalise(split_moments(cond[name])[0], self.latents)
        if f"{self.input}_mask" in batch:
            cond["frame_mask"] = batch[f"{self.input}_mask"]
        for name, number in self.constants.items():
            like = cond[self.conditions[0]]
            cond[name] = torch.full((len(like),), number, device=like.device)
        return cond

    def _answer(self, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The network's prediction, and v if it learns the variance; each (B, C, ...)."""
        x, time = network_input(self.path, x_t, t)
        output = nets["model"](self.beside(x, cond), time, self.encoders(nets, at_time(cond, t)))
        channels = x_t.shape[1] * (2 if self.learns_variance else 1)
        if output.shape != (len(x_t), channels, *x_t.shape[2:]):
            how = "; half of them are for `variance: learned`" if self.learns_variance else ""
            raise ValueError(
                f"network model returned {tuple(output.shape)}; expected {(len(x_t), channels, *x_t.shape[2:])}: the shape of "
                f"its input with {channels} channels{how} (DiT: learn_sigma)"
            )
        if not self.learns_variance:
            return output, None
        y, v = output.chunk(2, dim=1)
        return y, v

    def beside(self, x: Tensor, cond: Cond) -> Tensor:
        """What the network is given for x_t, as its path scales it: x, and with it what a family puts beside it on channels."""
        return x

    def counted(self, cond: Cond) -> Tensor | None:
        """The frames (B, F) whose errors count: the real ones; None: all."""
        return cond.get("frame_mask")

    def _errors(self, nets: Nets, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Errors:
        """Of the network at time t."""
        x_t = add_noise(self.path, x0, eps, t)
        y = target_of(self.path, self.target, x0, eps, t)
        output, v = self._answer(nets, x_t, t, cond)
        bits = None
        if v is not None:
            assert isinstance(self.path, Chain)
            # the mean is trained by the error alone
            x0_hat, _ = recover(x_t, output.detach(), self.target, self.path, t)
            bits = variational_term(self.path, self.path.steps, x0, x_t, x0_hat, v.float(), t)
        mean = partial(sample_mean, frame_mask=self.counted(cond))
        squares = (output.float() - y).square()
        if LIGHT in cond:
            height, width = squares.shape[-2:]
            squares = squares * torch.nn.functional.adaptive_avg_pool2d(cond[LIGHT], (height, width))
        squared = mean(squares)
        distance = squared if isinstance(self.distance_of, Squared) else self.distance_of.of(squares, mean)
        return Errors(distance, squared, mean(y.square()), bits)

    # ------------------------------------------------------------------------------------------ the objective

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples of the target's weighted distance; with a learned variance also its variational term.

        Metrics: `loss`; where it is not the mean squared error alone also that, `mse`, and with a learned variance `bits`; and `loss_t0`
        .. `loss_t3`, the squared error as (sum, count) over the samples whose time lies in each quarter of [0, t_max] (on EDM's path, in
        each quarter of the distribution of sigma).
        """
        x0, eps = self.pair(batch, rng, train=True)
        times = self.times
        t, rarity, share = times.draw(rng) if isinstance(times, Importance) else (times.sample(rng), 1.0, rng.positions)
        t = shift_time(t, self.time_shift.of(x0.shape))
        errors = self._errors(nets, x0, eps, t, self.condition_drop(self.told_of(batch, rng, train=True), rng))
        weight = weight_of(self.weight, self.path, self.target, t)
        weighted = errors.distance if weight is None else errors.distance * weight
        if isinstance(times, Importance):
            times.see(share, weighted.detach())
            weighted = weighted * rarity
        total = weighted.mean()
        if errors.bits is not None:
            total = total + self.variational_weight * errors.bits.mean()

        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {"loss": total.detach()}
        if weighted is not errors.squared or errors.bits is not None:
            metrics["mse"] = errors.squared.detach().mean()
        if errors.bits is not None:
            metrics["bits"] = errors.bits.detach().mean()
        return Loss(total, metrics | by_time(errors.squared.detach(), self._bucket(t), NUM_BUCKETS))

    def _bucket(self, t: Tensor) -> Tensor:
        """The quarter of [0, t_max], or on EDM's path of the distribution of sigma, that each time lies in, (B,)."""
        if isinstance(self.path, EDM):
            return torch.bucketize(t, self.times.quantile(constant((0.25, 0.5, 0.75), t.dtype, t.device)))
        return (t * NUM_BUCKETS).long().clamp(0, NUM_BUCKETS - 1)

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """Importance sampling follows the global batch's losses."""
        if isinstance(self.times, Importance):
            self.times.follow(sum_over_ranks)
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.times.state_dict() if isinstance(self.times, Importance) else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the objective's state is {sorted(self.state_dict())}; got {sorted(state)}")
        if isinstance(self.times, Importance):
            self.times.load_state_dict(state)

    def validation_times(self) -> Tensor:
        """Eight equidistant times (i + 0.5) / 8, or on EDM's path and for discrete times the quantiles there, (8,) float32."""
        u = (torch.arange(NUM_VALIDATION_TIMES) + 0.5) / NUM_VALIDATION_TIMES
        times = self.times.base if isinstance(self.times, Importance | Stratified) else self.times
        by_quantile = isinstance(self.path, EDM) or isinstance(times, Discrete)
        return times.quantile(u) if by_quantile else u * self.path.t_max

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """Mean squared error at eight fixed times for each sample, with the same noise at all of them, and no drops.

        Returns:
            `loss` and `loss_zero` (of a network that answers zero), the means over the times, `loss_t0` .. `loss_t7`, and with
            a learned variance `bits`, the mean of its variational term, which is no part of `loss`; each (B,) float32.
        """
        x0, eps = self.pair(batch, rng, train=False)
        cond = self.told_of(batch, rng, train=False)
        errors, zeros, terms = [], [], []
        for time in self.validation_times().tolist():
            found = self._errors(nets, x0, eps, torch.full((len(x0),), time, device=x0.device), cond)
            errors.append(found.squared)
            zeros.append(found.zero)
            terms += [] if found.bits is None else [found.bits]
        return {
            "loss": torch.stack(errors).mean(0),
            "loss_zero": torch.stack(zeros).mean(0),
            **({"bits": torch.stack(terms).mean(0)} if terms else {}),
            **{f"loss_t{i}": error for i, error in enumerate(errors)},
        }

    def likelihood(
        self,
        nets: Nets,
        batch: Batch,
        rng: Rng,
        *,
        exact: bool = False,
        tolerance: float = 1e-5,
        earliest: float = 1e-5,
    ) -> Mapping[str, Tensor]:
        """`bits` of each value of a sample, of bytes where the images are bytes (dequantised evenly); `evaluations` of the network; and on
        paths that end at t = 1 `straightness` of the lines from fresh noise. Each (B,) float64; see processes.flow.

        Draws, by name: `dequantise`, `probe` of the estimated divergence, `noise`, and `posterior` where moments are stored.
        """
        missing = [name for name in (self.input, *self.conditions) if name not in batch]
        if missing or f"{self.input}_mask" in batch:
            what = f"have no field {missing[0]!r}" if missing else "are clips of many lengths"
            raise UserError(f"likelihood: the data {what}; expected {[self.input, *self.conditions]}, of one size", 3)
        x0 = self.clean(batch, rng)
        width = PIXEL if self.input == "image" and were_bytes(x0) else None
        if width is not None:
            x0 = x0 + width * (rng.uniform("dequantise", x0.shape[1:]) - 0.5)
        probe = None if exact else (rng.uniform("probe", x0.shape[1:]) - 0.5).sign()
        velocity = velocity_of(self.predictor(nets, self.condition(batch)), self.path)
        found = log_likelihood(velocity, self.path, x0, probe=probe, tolerance=tolerance, earliest=earliest)
        bits = bits_of(found.nats, x0[0].numel(), width)
        values = {"bits": bits, "evaluations": torch.full_like(bits, found.evaluations)}
        if self.path.t_max == 1.0:
            values["straightness"] = straightness(velocity, self.path, rng.normal("noise", x0.shape[1:])).double()
        return values

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        takes: set[Word] = {"sampler", "steps", "size", "length", "guidance", "image", "strength", "mask", "begin"}
        if self.conditions:
            takes |= {"prompt", "label", "negative", "control"}
        if EMBEDDED in self.constants:
            takes |= {"true_guidance"}
        if set(SIZES) & set(self.conditions):
            takes |= {"sizes"}
        return Draws(
            self.input,
            takes=frozenset(takes),
            conditions=self.conditions,
            encoded=self.latent_conditions,
            walks="denoise",
            constants=self.constants,
            drops=self.condition_drop.drops,
        )

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        """Conditions of a batch with their masks, and the shape of its samples: of moments half the channels; clips of many lengths,
        which have a mask, are stored with their frames first."""
        names = [name for name in self.conditions if name in batch]
        masks = [f"{name}_mask" for name in names if f"{name}_mask" in batch]
        cond = {name: batch[name] for name in (*names, *masks)}
        cond |= {name: pixels_of(batch, name) for name in names if is_picture(batch, name)}
        if self.coupling.fields:
            return cond, replace(request, shape=tuple(batch[self.coupling.fields[0]].shape[1:]))
        shape, mask = tuple(batch[self.input].shape[1:]), f"{self.input}_mask"
        if mask in batch:
            shape = (shape[1], shape[0], *shape[2:])
        if self.input == "moments":
            shape = (shape[0] // 2, *shape[1:])
        lengths = batch[mask].sum(1) if mask in batch else None
        return cond, replace(request, shape=shape, lengths=lengths)

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """From noise (`noise` of `request.shape`) to data under guidance, (B, C, ...) float32 in model space. Samples that are given, as
        batches have them, are noised as far as `request.strength` says and drawn anew from there, with a `mask` where that is 1."""
        given = self._told(cond, request)
        null = self.null_condition(given) if request.negative is None else self._told(request.negative, request)
        sampler, noise = self.sampler_of(request), rng.normal("noise", request.shape)
        start = self._start(request, rng)
        if start is not None and MASK in request.given:
            sampler = Keeping(sampler, start.x0, request.given[MASK] >= 0.5)
            start = None if start.strength == 1 else start
        x0 = self._walked(nets, sampler, request.guidance, given, null, noise, rng, request.progress, start)
        return Generated(x0, request.lengths)

    def _start(self, request: Request, rng: Rng) -> Start | None:
        """Where drawing begins: at given samples, or in noise."""
        given = request.given.get(self.input)
        if given is None:
            return None
        return Start(self.clean(Batch({self.input: given}, rng.positions, rng.positions), rng), request.strength)

    def _told(self, cond: Cond, request: Request) -> dict[str, Tensor]:
        """The network's conditions: the request's, the constants, the mask of real frames, and the guidance scale."""
        told = self.condition(cond)
        if request.lengths is not None:
            frames = torch.arange(request.shape[1], device=request.lengths.device)
            told["frame_mask"] = frames < request.lengths[:, None]
        if request.guidance.embedded is not None:
            told[EMBEDDED] = torch.full_like(told[EMBEDDED], request.guidance.embedded)
        return told

    def _walked(
        self,
        nets: Nets,
        sampler: NoiseSampler,
        guidance: Guidance,
        given: Cond,
        null: Cond,
        noise: Tensor,
        rng: Rng,
        progress: Callable[[int, int], None],
        start: Start | None = None,
    ) -> Tensor:
        """The sampler's result with predictions under `given` conditions, guided away from `null`."""

        def make(cond: Cond) -> Predictor:
            return self.predictor(nets, cond, variance=sampler.learns_variance)

        weaker = None
        if guidance.by and guidance.scale != 1:
            weaker = self.predictor({**nets, "model": nets[guidance.by]}, given, variance=sampler.learns_variance)
        rescaled = rescaled_to(guidance.rescale, self.target, self.path)
        denoise = guide_batched(
            make, given, null, guidance.scale, guidance.channels, guidance.interval, rescaled, weaker
        )
        return sampler.sample(
            denoise, noise, path=self.path, rng=rng, callback=lambda step, t, x, x0: progress(step, sampler.steps),
            start=start,
        )  # fmt: skip

    def unconditional(self, cond: Cond) -> Cond:
        return self.null_condition(self.condition(cond))

    def null_condition(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional conditions for guidance; see `objectives.conditions.null_condition`."""
        return null_condition(cond, self.condition_drop.dropped, self.no_text)

    def predictor(self, nets: Nets, cond: Cond, uncond: bool = False, variance: bool = False) -> Predictor:
        """`denoise(x_t, t) -> (x0, eps)` in model space, for samplers; `uncond` predicts without the condition.

        With `variance` it answers (x0, eps, v): see `processes.reverse.learned_log_variance`.
        The network is called without a surrounding `no_grad`: the caller's `engine.weights` has one.
        """
        given = self.null_condition(cond) if uncond else cond
        if variance and not self.learns_variance:
            raise UserError("sample.variance: 'learned' needs objective.variance: learned; choose small, large or none")

        def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            y, v = self._answer(nets, x_t, t, given)
            pair = recover(x_t, y, self.target, self.path, t)
            return (*pair, v.float()) if variance and v is not None else pair

        return denoise

    def misfit(self, sampler: Sampler, guidance: Guidance) -> str | None:
        """Tries the sampler with a network that predicts zero, so that its mistakes show before samples are first drawn."""
        doubled = 2 if self.learns_variance else 1

        def zero(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return x.new_zeros(len(x), doubled * x.shape[1], *x.shape[2:])

        plain, cond = copy.copy(self), {"given": torch.zeros(2, 1)}
        plain.beside = lambda x, cond: x  # type: ignore[method-assign]  # the walk is tried, whose network is told nothing
        rng = ProgressRng(0, 0, "draw", torch.arange(2), torch.device("cpu"))
        try:
            with torch.no_grad():
                noise = rng.normal("noise", (4, 16, 16))
                walk, told = cast(NoiseSampler, sampler), Request().progress
                x0 = plain._walked({"model": zero, guidance.by: zero}, walk, guidance, cond, cond, noise, rng, told)
        except (UserError, ValueError, ArithmeticError, RuntimeError) as error:
            return f"with objective.target {self.target!r} on path {self.path}: {error}"
        if not bool(x0.isfinite().all()):
            return f"with objective.target {self.target!r} on path {self.path}: what is drawn is not finite"
        return None

    def refitted(self, sampler: Sampler) -> Sequence[str]:
        targets = [target for target in TARGETS if target != self.target and self._with(target, sampler)]
        return [f"objective.target: {' or '.join(targets)} (another network: retrain it)"] if targets else []

    def _with(self, target: str, sampler: Sampler) -> bool:
        """Whether the sampler works with a network that predicts `target`."""
        other = copy.copy(self)
        other.target = target
        return other.misfit(sampler, Guidance()) is None
