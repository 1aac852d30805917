"""A run or its engine, and conditions -> samples. Serves the command line, the scores, the sample callback and exports.

What a family draws, and what it takes to do so, its objective declares (`contracts.Draws`); nothing here knows more of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nexus_scale.conditioners.conditions import Conditions
from nexus_scale.config.kinds import shown
from nexus_scale.config.recipe import Adapter as AdapterEntry
from nexus_scale.config.recipe import Component, Recipe, network_class
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import (
    SIZES,
    Adapter,
    Cond,
    Draws,
    Generated,
    Guidance,
    Objective,
    Request,
    Rng,
    RunFolder,
    UserError,
    Word,
)
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import Checkpoint, checkpoint_at, load_network, newest_of
from nexus_scale.engine.hardware import CPU, Hardware, hardware_of
from nexus_scale.generate.drawing import (
    Size,
    check_sampling,
    chosen_guidance,
    drawn_by,
    refuse,
    rehearse_decoding,
    rehearse_size,
    request_of,
    sizes_of,
)
from nexus_scale.generate.exported import Exported, exported_at
from nexus_scale.generate.latents import Latents
from nexus_scale.generate.speech import Speaking, Voice, in_manner
from nexus_scale.generate.while_training import Dots, Drawing, Pictures, Shows, Sounds
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.media import Medium, Undecodable
from nexus_scale.media.latent_space import check_normalisation
from nexus_scale.media.opening import open_medium
from nexus_scale.media.pictures import to_uint8
from nexus_scale.rehearsal.batches import networks_on_meta
from nexus_scale.run.files import open_run, precision_of
from nexus_scale.train import Place, frozen_network, make_objective, open_data

log = logging.getLogger(__name__)

LARGEST = 64
"""A sample may have this many times the pixels of the data."""


def make_draw(
    recipe: Recipe, place: Place, objective: Objective, dataset: Any, hardware: Hardware = CPU
) -> Drawing | None:
    """What draws for callbacks: under fixed conditions of the validation split and with fixed noise, each sample in the size of its bucket.

    Returns:
        None where nothing can be drawn, which is said.
    """
    held_out = (
        dataset if recipe.data.validation is None else open_data(recipe, place.data_root, "validation", beside=dataset)
    )
    try:
        shows = _shows(recipe, place, objective, held_out, hardware)
    except (NothingToDraw, Undecodable) as reason:
        if distributed.rank() == 0:
            log.info("no samples while training: %s", reason)
        return None
    return Drawing(recipe, objective, held_out, shows)


class NothingToDraw(UserError):
    """Why a run draws no samples while it trains, which is no mistake."""


def _shows(recipe: Recipe, place: Place, objective: Objective, held_out: Any, hardware: Hardware) -> Shows:
    """The road from a family's samples to something to see or hear.

    Raises:
        NothingToDraw, Undecodable: why not.
    """
    draws = objective.draws
    if draws is None:
        raise NothingToDraw(f"objective {recipe.objective.name} draws nothing")
    if draws.walks and recipe.sample is None:
        raise NothingToDraw(f"recipe {recipe.name} has no `sample:` section")
    medium = medium_of(recipe, place, objective, held_out, hardware)  # opened by all ranks, before the first step
    if medium.name == "point":
        return Dots(medium)
    return Sounds(medium) if medium.name == "audio" else Pictures((draws.makes, *draws.given), medium)


def medium_of(recipe: Recipe, place: Place, objective: Objective, dataset: Any, hardware: Hardware = CPU) -> Medium:
    """The medium of a run's samples.

    Raises:
        Undecodable: the recipe names nothing that decodes them.
    """
    draws = drawn_by(recipe, objective)
    return open_medium(
        recipe, dataset, place.runs_root, place.data_root, field=draws.makes, device=hardware.device, dtype=hardware.dtype,
        sample_rate_hz=draws.sample_rate_hz,
    )  # fmt: skip


def decoder_of(recipe: Recipe, place: Place, objective: Objective, dataset: Any) -> Callable[[Tensor], Tensor] | None:
    """Samples of model space (B, ...) to what is seen of them, (B, 3, ...), for a rehearsal; None: nothing is seen of them, or nothing is
    drawn from noise."""
    if objective.draws is None or objective.draws.walks != "denoise":
        return None
    try:
        medium = medium_of(recipe, place, objective, dataset)
    except Undecodable:
        return None  # said by whoever wants to draw
    if medium.name == "audio":
        return None  # sound of any length
    return lambda samples: torch.stack(medium.decode(samples))


class _Networks(dict[str, Any]):
    """Networks by name. Frozen ones and averages beside the weights that draw are loaded once drawing calls for them: a teacher may never
    be."""

    def __init__(self, load: Callable[[str], torch.nn.Module]):
        super().__init__()
        self._load = load

    def __missing__(self, name: str) -> Any:
        self[name] = self._load(name)
        return self[name]


class Trained:
    """A run's networks as they were at its newest checkpoint, with averaged weights where the recipe has them, in this process.

    Attributes:
        adapters: what was trained of adapters, by their names in `nets`, where their bases have their changes.

    Args:
        run: the run folder, or an exported one.
        place: roots, to find its data's statistics and encoders.
        weights: an average, or a trained network's own name for its weights without one; None: the first average of each network, or its
            own weights where it has none.
        hardware: where networks and decoders compute; None: the accelerator of the run's own cluster in the run's precision, or the CPU.
        step: of an earlier checkpoint that was kept; None: the newest.
    """

    def __init__(
        self,
        run: RunFolder,
        place: Place,
        weights: str | None = None,
        hardware: Hardware | None = None,
        step: int | None = None,
    ):
        self.run, self.place = run, place
        if (exported := exported_at(run.path)) is not None:
            if step not in (None, exported.step):
                raise UserError(f"--step {step}: {run.path} was exported at step {exported.step}; leave it out")
            self._take(exported, weights, hardware)
            return
        _, self.recipe, cluster = open_run(run.path)
        self.hardware = hardware or hardware_of(cluster, precision_of(run))
        checkpoint = newest_of(run) if step is None else checkpoint_at(run, step)
        self.step = checkpoint.step
        known = [*self.recipe.averages(), *self.recipe.trained()]
        if weights is not None and weights not in known:
            raise UserError(f"--weights {shown(weights)}: {nearest(weights, known)}")
        self.adapters: dict[str, Adapter] = {}
        self.nets = _Networks(lambda name: self._beside(name, checkpoint, weights))
        for name in self.recipe.trained():
            self.nets[name] = self._read(name, checkpoint, self._weights_of(name, weights))
        self.dataset = open_data(self.recipe, place.data_root, runs_root=place.runs_root)
        check_normalisation(run, self.dataset)
        self.objective = make_objective(self.recipe, self.dataset.latent_stats, self.dataset.no_text)

    def _beside(self, name: str, checkpoint: Checkpoint, weights: str | None) -> torch.nn.Module:
        """A network that drawing calls beside the trained ones: a frozen one, or an average, which those that it is the weights of are."""
        averages = self.recipe.averages()
        if name not in averages:
            return self.hardware.hold(frozen_network(name, self.recipe, self.place, checkpoint.state))
        of = averages[name].average_of
        if self._weights_of(of, weights) == name:
            return self.nets[of]
        return self._read(of, checkpoint, name)

    def _read(self, network: str, checkpoint: Checkpoint, weights: str) -> torch.nn.Module:
        """A trained network with weights of its own or of an average."""
        entry = self.recipe.trained()[network]
        cls, arguments = network_class(entry)
        made = cls(**arguments)
        load_network(checkpoint, weights, made)
        if isinstance(entry, AdapterEntry):
            made.attach(base := frozen_network(entry.adapts, self.recipe, self.place, checkpoint.state))
            self.adapters[network] = made
            if (made := made.merge()) is not base:  # into a copy of the base of its own
                self.hardware.hold(base)
        return self.hardware.hold(made)

    def _take(self, exported: Exported, weights: str | None, hardware: Hardware | None) -> None:
        """Draws with an exported folder's weights."""
        if weights is not None:
            raise UserError(f"--weights {shown(weights)}: an exported folder has one set of weights; leave it out")
        self.recipe, self.step = exported.recipe, exported.step
        self.hardware = hardware or hardware_of(exported.cluster)
        self.nets = _Networks(self._beside_exported)
        for name, network in exported.networks().items():
            self.nets[name] = self.hardware.hold(network)
        self.dataset = open_data(self.recipe, self.place.data_root, runs_root=self.place.runs_root)
        if exported.stats != self.dataset.latent_stats:
            raise UserError(
                f"{self.run.path}: was exported for latents normalised as {exported.stats}; the data's are normalised as "
                f"{self.dataset.latent_stats}: restore the data, or export the run again",
                code=3,
            )
        self.objective = make_objective(self.recipe, self.dataset.latent_stats, self.dataset.no_text)

    def _beside_exported(self, name: str) -> torch.nn.Module:
        """As `_beside`, of an exported folder, which holds the first average of its network."""
        averages = self.recipe.averages()
        if name not in averages:
            return self.hardware.hold(frozen_network(name, self.recipe, self.place, {}))
        of = averages[name].average_of
        if self._weights_of(of, None) != name:
            raise UserError(
                f"{self.run.path}: was exported without the average {name!r}, which drawing calls; draw from the run itself"
            )
        return self.nets[of]

    def _weights_of(self, network: str, asked: str | None) -> str:
        """The weights of a network that were asked for; its first average, or its own, where another network's were asked for."""
        averages, trained = self.recipe.averages(), self.recipe.trained()
        of = averages[asked].average_of if asked in averages else asked
        if asked is None or (of in trained and of != network):
            return self.recipe.average_of(network) or network
        return asked

    @property
    def draws(self) -> Draws:
        """The objective's `draws`; raises a UserError where it draws nothing."""
        return drawn_by(self.recipe, self.objective)

    def conditions(self, prompts: Sequence[str], labels: Sequence[str | int] | None = None) -> dict[str, Tensor]:
        """Prompts as the network is conditioned on them; see `conditioners.conditions.Conditions.encode`.

        Raises:
            UserError: the run takes no prompts; no such class.
        """
        if self.draws.given:
            raise UserError(
                f"recipe {self.recipe.name} draws nothing from prompts: it shows what it makes of data, in {self.run.samples}"
            )
        return self.conditioned.encode(prompts, labels)

    @cached_property
    def conditioned(self) -> Conditions:
        """What turns prompts and classes into the conditions that the network was trained on."""
        highest = min((net.num_classes for net in self.nets.values() if net.num_classes), default=None)
        names, device = self.draws.conditions, str(self.hardware.device)
        return Conditions(self.recipe, names, self.dataset, self.place.data_root, highest, device)

    @cached_property
    def sizes(self) -> list[Size]:
        """The sizes of the run's data, the most frequent first."""
        return sizes_of(self.dataset, self.objective)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) or (C, F, H, W) of a sample unless another size is asked for: the most frequent size of the data."""
        return self.sizes[0].shape

    @cached_property
    def decoded_shape(self) -> tuple[int, ...]:
        """The shape that a sample of `shape` decodes to: an image (3, H, W), or a clip (3, F, H, W)."""
        self.require_decoder()  # weights are read before the rehearsal, in which tensors hold no values
        return rehearse_decoding(self.decoded, self.shape)

    def pixels_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of what a sample of this shape decodes to."""
        across = self.decoded_shape
        return shape[-2] * (across[-2] // self.shape[-2]), shape[-1] * (across[-1] // self.shape[-1])

    def shape_of(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """The shape of a sample of a size in pixels and a number of frames; None: the data's.

        Raises:
            UserError: the latents or the network have no such size.
        """
        across = self.decoded_shape
        height, width = across[-2] if height is None else height, across[-1] if width is None else width
        where = f"size {height}x{width}" if frames is None else f"size {height}x{width}, length {frames}"
        *front, _, _ = self.shape
        if frames is not None:
            front[-1] = self._latent_frames(frames)
        factors = across[-2] // self.shape[-2], across[-1] // self.shape[-1]
        if height < 1 or width < 1 or height % factors[0] or width % factors[1]:
            known = ", ".join(f"{size.shape[-2] * factors[0]}x{size.shape[-1] * factors[1]}" for size in self.sizes[:8])
            raise UserError(
                f"{where}: expected HEIGHTxWIDTH, multiples of {factors[0]} and {factors[1]} pixels; the data have {known}"
            )
        shape = (*front, height // factors[0], width // factors[1])
        if shape not in [size.shape for size in self.sizes]:
            if math.prod(shape) > LARGEST * math.prod(self.sizes[0].shape):
                raise UserError(
                    f"{where}: more than {LARGEST} times as many pixels as the data's; choose a smaller one"
                )
            nets = networks_on_meta(self.recipe, self.objective)
            rehearse_size(self.recipe, self.objective, nets, self.sizes[0].resized(shape), where)
        return shape

    def _latent_frames(self, frames: int) -> int:
        """The latent frames of a clip. Every latent frame but the first decodes to the same number of frames.

        Raises:
            UserError: samples are no clips, or no clip has so many frames.
        """
        if len(self.shape) != 4:
            raise UserError(f"--length {frames}: recipe {self.recipe.name} draws images; leave it out")
        one, two = self.frames_of(1), self.frames_of(2)
        latent = 1 + (frames - one) // (two - one)
        if latent < 1 or (frames - one) % (two - one):
            below = one + max(0, latent - 1) * (two - one)
            raise UserError(f"--length {frames}: clips have {below} or {below + two - one} frames, and none between")
        return latent

    def frames_of(self, latent: int) -> int:
        """How many frames so many latent ones of a clip decode to."""
        return rehearse_decoding(self.decoded, (self.shape[0], latent, *self.shape[2:]))[1]

    def check_steps(self, steps: int | None, sampler: Component | None = None) -> None:
        """Raises a UserError where the recipe's sampler, or the named one, cannot take so many steps or does not fit the network."""
        check_sampling(self.recipe, self.objective, steps, sampler)

    def guidance(
        self, guidance: float | Mapping[str, Any] | None = None, true_guidance: float | None = None
    ) -> Guidance:
        """See `drawing.chosen_guidance`."""
        return chosen_guidance(self.recipe, self.objective, guidance, true_guidance)

    @torch.no_grad()
    def generate(
        self,
        cond: Cond,
        request: Request,
        *,
        seed: int,
        positions: Sequence[int],
        latents: Latents | None = None,
    ) -> Generated:
        """One sample for each position, drawn together. A sample depends on the seed and on its position.

        Args:
            cond: conditions, one row a position.
            request: with its shape; what it gives, and what is guided away from, one row a position.
            latents: what is asked of the samples' latents; None: a draw for each.
        """
        take = self.hardware.take
        told = self._sizes(request.shape, len(positions)) | {name: cond[name] for name in SIZES if name in cond}
        sizes = {"lengths": torch.full((len(positions),), request.shape[1])} if self._masked else {}
        request = replace(
            request,
            given=take(request.given),
            negative=None if request.negative is None else take({**told, **request.negative}),
            **take(sizes),  # type: ignore[arg-type]
        )

        def at(places: Tensor) -> Rng:
            return ProgressRng(seed, 0, "sample", places, self.hardware.device)

        rng = at(torch.tensor(positions)) if latents is None else latents.rng(at, positions)
        return self.objective.generate(self.nets, take({**told, **cond}), request, rng)

    def _sizes(self, shape: Sequence[int], count: int) -> dict[str, Tensor]:
        """Sizes that the network is conditioned on, (count, 2): of whole images that were as large as what is drawn."""
        asked = [name for name in SIZES if name in self.draws.conditions]
        if not asked:
            return {}
        across = self.decoded_shape
        size = torch.tensor([shape[axis] * across[axis] // self.shape[axis] for axis in (-2, -1)])
        told = zip(SIZES, (size, torch.zeros_like(size), size), strict=True)
        return {name: value.expand(count, 2) for name, value in told if name in asked}

    @property
    def _masked(self) -> bool:
        """Whether samples of many lengths share a shape; all of one that is drawn is real."""
        return self.draws.walks == "denoise" and self.sizes[0].masked

    @torch.no_grad()
    def latents(
        self,
        cond: Mapping[str, Tensor],
        *,
        seed: int,
        steps: int | None = None,
        guidance: Guidance | float | None = None,
        sampler: Component | None = None,
        negative: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Tensor] | None = None,
        strength: float = 1.0,
        shape: tuple[int, ...] | None = None,
        positions: Sequence[int] | None = None,
        batch: int = 64,
        progress: Callable[[range], Callable[[int, int], None]] = lambda positions: lambda done, steps: None,
    ) -> Tensor:
        """Model-space samples (B, C, H, W), one a condition. Sample i depends on the seed and on its position, not on `batch`.

        Args:
            steps, guidance, sampler: instead of the recipe's.
            negative: conditions to be guided away from, one for each of `cond`; None: the unconditional ones.
            given, strength: what is drawn anew, one for each, and how far; see `Request`.
            shape: of a sample; see `shape_of`.
            positions: of the samples, 0, 1, ... unless given; of a network without conditions they say how many.
            progress: of the samples at these places, is told (steps done, steps).
        """
        numbers = range(len(next(iter(cond.values())))) if positions is None else positions
        asked = request_of(self.recipe, self.objective, steps=steps, guidance=guidance, sampler=sampler)
        asked = replace(asked, shape=self.shape if shape is None else shape, strength=strength)
        parts = []
        for begin in range(0, len(numbers), batch):
            rows = slice(begin, begin + batch)
            request = replace(
                asked,
                negative=None if negative is None else _rows(negative, rows),
                given=_rows(given or {}, rows),
                progress=progress(range(begin, min(begin + batch, len(numbers)))),
            )
            parts.append(self.generate(_rows(cond, rows), request, seed=seed, positions=numbers[rows]).samples)
        return torch.cat(parts)

    @cached_property
    def speaking(self) -> Speaking:
        return Speaking(self.recipe, self.place, self.dataset, self.hardware)

    @cached_property
    def voices(self) -> list[Voice]:
        """One of each held-out speaker; of the training data's where the recipe has no validation split."""
        split = "train" if self.recipe.data.validation is None else "validation"
        held_out = open_data(self.recipe, self.place.data_root, split, beside=self.dataset)
        return self.speaking.held_out(held_out, self.prompt_frames)

    @property
    def prompt_frames(self) -> int:
        """How long the acoustic prompts are that the run learned with."""
        return self.draws.prompt_frames

    def speak(
        self,
        texts: Sequence[str],
        voices: Sequence[Voice],
        *,
        manners: Sequence[Voice] | None = None,
        seed: int,
        batch: int = 16,
        positions: Sequence[int] | None = None,
        steps: int | None = None,
    ) -> list[Tensor]:
        """Sentences, each in its voice: waveforms (C, T). Sentence i depends on the seed and on its position, i unless given, not on
        `batch`. `manners`: whose durations and prosody they have; None: their voices'. `steps`: of the sampler; None: the recipe's.

        Raises:
            UserError: the run's family does not speak; a text that cannot be said.
        """
        asked: dict[str, Word] = {"voices": "voice"} if manners is None else {"voices": "voice", "manners": "prosody"}
        refuse(self.recipe, self.draws, asked)
        said: list[Tensor] = []
        numbers = range(len(texts)) if positions is None else positions
        for begin in range(0, len(texts), batch):
            part = slice(begin, min(begin + batch, len(texts)))
            cond, given = self.speaking.condition(texts[part], voices[part])
            if manners is not None:
                others = in_manner(manners[part])
                cond, given = {**cond, **others[0]}, {**given, **others[1]}
            request = replace(request_of(self.recipe, self.objective, steps=steps), given=given)
            made = self.generate(cond, request, seed=seed, positions=numbers[part])
            said += self.shown(made, [voice.codes for voice in voices[part]])
        return said

    def shown(self, made: Generated, before: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Samples as one sees or hears them; see `Medium.decode`. Logs how many were cut before they ended."""
        lengths = None if made.lengths is None else made.lengths.tolist()
        if made.ended is not None and (cut := int((~made.ended).sum())):
            log.warning("%d of %d samples were cut before they ended: raise sample.max_tokens", cut, len(made.ended))
        return self.medium.decode(made.samples, lengths, before)

    def require_decoder(self) -> None:
        """Raises a UserError where nothing decodes the run's samples: the recipe names no autoencoder or codec."""
        _ = self.medium

    @cached_property
    def medium(self) -> Medium:
        """The samples' medium; raises a UserError where the recipe names nothing that decodes them."""
        return medium_of(self.recipe, self.place, self.objective, self.dataset, self.hardware)

    def decoded(self, latents: Tensor) -> Tensor:
        """Model-space latents -> images (B, 3, H, W) or clips (B, 3, F, H, W), float32 in [-1, 1], of values that eight bits hold."""
        return torch.stack(self.medium.decode(latents))

    def images(self, latents: Tensor) -> Tensor:
        """Model-space latents -> images (B, H, W, 3) uint8 on the CPU; of clips, strips of frames."""
        return to_uint8(self.decoded(latents)).cpu()


def _rows(cond: Cond, rows: slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in cond.items()}
