"""A run or its engine, and conditions -> samples. Serves the command line, the scores, the sample callback and exports.

What a family draws follows from its objective alone: one with a `predictor` is sampled through the recipe's sampler and guidance;
one with `reconstruct` shows what the network makes of data; one with `continued` goes on with sounds that it is given the beginning of,
and with `speak` says sentences in a voice. Images and waveforms are told apart by their shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nexus_scale import registry
from nexus_scale.contracts import Engine, Objective, Rng, RunFolder, UserError
from nexus_scale.data.dataset import Dataset
from nexus_scale.data.dataset import Source as DataSource
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import load_network, newest
from nexus_scale.interop.encoders import TextEncoder
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.latent_space import check_normalisation, decoder_of
from nexus_scale.processes.latents import denormalise
from nexus_scale.recipe import Recipe, network_class
from nexus_scale.run_files import open_run
from nexus_scale.samplers.guidance import guide_batched
from nexus_scale.speak import Sound, Speaking, Voice, sound
from nexus_scale.train import Draw, Place, make_objective, open_data

log = logging.getLogger(__name__)

CLASS_SAMPLES = 1 << 14
"""Samples that are looked at for the names of classes."""


@dataclass(frozen=True)
class Drawn:
    """One sample: its caption, and an image (H, W, 3) uint8. Sounds are `speak.Sound`."""

    caption: str
    image: Any


def sample_latents(
    objective: Objective,
    nets: Mapping[str, Any],
    recipe: Recipe,
    cond: Mapping[str, Tensor],
    noise: Tensor,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """From noise to data under guidance.

    Args:
        cond: conditions, each (B, ...).
        noise: x at t_max, (B, C, H, W) float32.
        steps, guidance: of the sampler; None takes the recipe's.
        rng: what samplers that add noise on the way draw it from.
    Returns:
        (B, C, H, W) float32 in model space.
    """
    sampler = sampler_of(recipe, steps)
    assert recipe.sample is not None
    scale, channels = guidance_of(recipe.sample.arguments.get("guidance", 1.0))
    scale = scale if guidance is None else guidance
    family: Any = objective
    given = family.condition(cond)  # without what else a batch holds
    asked = {"variance": True} if getattr(sampler, "learns_variance", False) else {}
    denoise = guide_batched(
        lambda c: family.predictor(nets, c, **asked), given, family.null_condition(given), scale, channels
    )
    draws = {"rng": rng} if getattr(sampler, "stochastic", False) else {}
    x0: Tensor = sampler.sample(denoise, noise, path=family.path, **draws)
    return x0


def guidance_of(spec: float | Mapping[str, Any]) -> tuple[float, int | None]:
    """Scale, and how many of the first channels it is for (None: all), from `sample.guidance`: 4.0 or {scale: 4.0, channels: 3}.

    Raises:
        UserError: an unknown key, or a value that is no number.
    """
    values: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"scale": spec}
    scale, channels = values.pop("scale", 1.0), values.pop("channels", None)
    whole = channels is None or (isinstance(channels, int) and channels >= 1)
    if values or not isinstance(scale, int | float) or not whole:
        raise UserError(f"sample.guidance: got {spec!r}; expected a number, or {{scale: 4.0, channels: 3}}")
    return float(scale), channels


STRIP = 8
"""Frames of a clip that are shown side by side, at most."""


def filmstrip(videos: Tensor) -> Tensor:
    """Frames of clips side by side, evenly from the first to the last: (B, 3, F, H, W) -> (B, 3, H, n * W), n at most STRIP."""
    frames = videos.shape[2]
    chosen = torch.linspace(0, frames - 1, min(frames, STRIP)).round().long()
    return torch.cat(videos[:, :, chosen.to(videos.device)].unbind(2), dim=3)


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8; clips (B, 3, F, H, W) become strips of frames."""
    if images.ndim == 5:
        images = filmstrip(images)
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def sampler_of(recipe: Recipe, steps: int | None = None) -> Any:
    """The recipe's sampler, with another number of steps where one is given.

    Raises:
        UserError: the recipe has none, or wrong arguments.
    """
    if recipe.sample is None:
        raise UserError(
            f"recipe {recipe.name} has no `sample:` section; add one, for example {{name: ode, steps: 25, guidance: 4.0}}"
        )
    arguments = {key: value for key, value in recipe.sample.arguments.items() if key != "guidance"}
    if steps is not None:
        arguments["steps"] = steps
    cls = registry.find("samplers", recipe.sample.name)
    return cls(**registry.check_arguments(cls, arguments, "sample"))


DRAWS = ("predictor", "reconstruct", "continued")
"""What an objective may offer of which samples are drawn: `denoise` for a sampler, data rebuilt, or codes of data gone on with."""


def make_draw(recipe: Recipe, place: Place, objective: Objective, dataset: Any, count: int = 24) -> Draw | None:
    """The drawer of the sample callback: `count` samples under fixed conditions of the validation split and fixed noise.

    Every rank draws an equal part, so that all run the same number of forwards; rank 0 gets them all.
    Returns:
        None where the objective offers nothing to draw, the data are made up, or nothing shows the latents, which is said.
    """
    missing = None
    if recipe.data.synthetic is not None:
        missing = "the data are made up"
    elif not any(hasattr(objective, name) for name in DRAWS):
        missing = f"the objective {recipe.objective.name} offers nothing to draw"
    elif hasattr(objective, "predictor") and not decodes(recipe, objective):
        missing = "data.encoders.moments, the autoencoder that turns latents into images, is left out"
    if missing is not None:
        if distributed.rank() == 0:
            log.info("no samples while training: %s", missing)
        return None
    family: Any = objective
    held_out = dataset if recipe.data.validation is None else open_data(recipe, place.data_root, "validation")
    average = next(iter(recipe.averages()), next(iter(recipe.trained())))
    decode = _decoder(recipe, place, objective, held_out) if hasattr(objective, "predictor") else None
    speaking = Speaking(recipe, place, held_out) if hasattr(objective, "continued") else None
    codec = speaking.codec if speaking is not None else None  # opened by all ranks together, and before the first step

    def draw(engine: Engine, step: int) -> list[Any] | None:
        world = engine.world_size
        each = -(-count // world)
        batch = next(iter(held_out.fixed(each * world, rank=engine.rank, world_size=world, batch=each)), None)
        if batch is None:
            log.warning("no samples are drawn: no bucket of the validation data has one for each of %d workers", world)
            return None
        batch = batch.on(engine.device)
        rng = ProgressRng(recipe.seed, 0, "draw", batch.positions, engine.device)
        with engine.weights(average):
            if decode is not None:
                noise = rng.normal("noise", latent_shape(held_out, _input(objective)))
                x0 = sample_latents(objective, engine.nets, recipe, batch.fields, noise, rng=rng)
                drawn = to_uint8(decode(denormalise(x0, family.latents).cpu()))
            elif speaking is not None:
                sampler = sampler_of(recipe)
                drawn = family.continued(
                    engine.nets, batch, sampler, rng, lambda done: not distributed.any_rank(not done)
                )
            else:
                drawn = family.reconstruct(engine.nets, batch).cpu()
                drawn = drawn if drawn.ndim == 3 else to_uint8(drawn)
        gathered = distributed.gather(drawn)
        numbers = distributed.gather(batch.samples)
        if gathered is None or numbers is None:
            return None
        captioned = list(zip(captions_of(held_out, numbers.tolist()), gathered, strict=True))[:count]
        if speaking is not None and codec is not None:
            rate = codec.sample_rate_hz
            return [sound(caption, speaking.wave(codes[codes[:, 0] >= 0]), rate) for caption, codes in captioned]
        if gathered.ndim == 3:  # waveforms (B, C, T)
            return [sound(caption, wave.mean(0), family.sample_rate_hz) for caption, wave in captioned]
        return [Drawn(caption, image.numpy()) for caption, image in captioned]

    return draw


def captions_of(dataset: Any, samples: Sequence[int]) -> list[str]:
    """Captions of samples where the data carry them, else their keys."""
    captions: list[str] = dataset.texts("caption", samples) if _captioned(dataset) else dataset.keys(samples)
    return captions


def _captioned(dataset: Any) -> bool:
    return all(any("caption" in manifest.fields for manifest in joined) for joined in dataset.sources)


def latent_shape(dataset: Any, field: str = "moments") -> tuple[int, ...]:
    """(C, H, W) of what a network draws: a latent, from the stored moments (2C, H, W), or an image."""
    channels, *rest = dataset.fields[field]
    return (channels // 2 if field == "moments" else channels, *rest)


def _input(objective: Objective) -> str:
    """The field that holds the clean sample."""
    return getattr(objective, "input", "moments")


def decodes(recipe: Recipe, objective: Objective) -> bool:
    """Whether what the run draws can be shown: pixels, or latents whose autoencoder the recipe names."""
    return _input(objective) == "image" or isinstance(recipe.data.encoders.get("moments"), dict)


def _decoder(recipe: Recipe, place: Place, objective: Objective, dataset: Any) -> Callable[[Tensor], Tensor]:
    if _input(objective) == "image":
        return lambda pixels: pixels
    return decoder_of(recipe, dataset, place.runs_root, place.data_root)


class Trained:
    """A run's networks as they were at its newest checkpoint, with averaged weights where the recipe has them, in this process.

    Args:
        run: the run folder.
        place: roots, to find its data's statistics and encoders.
        weights: which average; None takes the recipe's first, or the trained weights.
    """

    def __init__(self, run: RunFolder, place: Place, weights: str | None = None):
        self.run, self.place = run, place
        _, self.recipe, _ = open_run(run.path)
        checkpoint = newest(run.checkpoints)
        if checkpoint is None:
            raise UserError(f"{run.path}: no checkpoint that verifies; train it first: nexus train {run.path}", code=5)
        self.step = checkpoint.step
        self.nets: dict[str, torch.nn.Module] = {}
        for name, spec in self.recipe.trained().items():
            cls, arguments = network_class(spec)
            average = weights or next((a for a, s in self.recipe.averages().items() if s["average_of"] == name), name)
            network = cls(**arguments)
            load_network(checkpoint, average, network)
            self.nets[name] = network.eval().requires_grad_(False)
        self.dataset = open_data(self.recipe, place.data_root)
        check_normalisation(run, self.dataset)
        self.objective = make_objective(self.recipe, self.dataset.latent_stats)

    def conditions(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts through the text encoder that the recipe names, cut or padded as in training; classes by name or number where
        the network is told classes."""
        if "label" in getattr(self.objective, "conditions", ()):
            return {"label": self.labels(prompts)}
        spec = self.recipe.data.encoders.get("text")
        if spec is None:
            raise UserError(
                f"recipe {self.recipe.name} names no text encoder (data.encoders.text), so it takes no prompts"
            )
        if not isinstance(spec, dict):
            raise UserError("data.encoders.text: prompts are drawn with one text encoder; got several")
        encoded = TextEncoder.open(spec, self.place.data_root).encode(list(prompts))
        length = self.recipe.data.text_tokens or max(len(tokens) for tokens, _ in encoded)
        text = torch.zeros(len(encoded), length, encoded[0][0].shape[-1])
        mask = torch.zeros(len(encoded), length, dtype=torch.bool)
        for row, (tokens, _) in enumerate(encoded):
            real = min(len(tokens), length)
            text[row, :real] = torch.from_numpy(tokens[:real]).float()
            mask[row, :real] = True
        cond = {"text": text, "text_mask": mask}
        if encoded[0][1] is not None:
            cond["pooled"] = torch.stack([torch.from_numpy(pooled).float() for _, pooled in encoded])
        return cond

    @cached_property
    def classes(self) -> dict[str, int]:
        """Numbers of classes by name: the caption that all samples of a class share. Empty where captions say more than that."""
        split = self.recipe.data.train
        if split is None or not _captioned(self.dataset):
            return {}
        folders = [source.folders for source in split.sources]
        labels = Dataset.open([DataSource([self.place.data_root / f for f in each]) for each in folders], ["label"])
        seen: dict[int, list[int]] = {}
        for batch in labels.fixed(min(labels.samples, CLASS_SAMPLES), batch=1024):
            for label, sample in zip(batch["label"].tolist(), batch.samples.tolist(), strict=True):
                if len(seen.setdefault(label, [])) < 2:
                    seen[label].append(sample)
        names: dict[str, int] = {}
        for label, samples in sorted(seen.items()):
            captions = set(self.dataset.texts("caption", samples))
            if len(captions) > 1:
                return {}
            names[captions.pop()] = label
        return names

    def labels(self, wanted: Sequence[str | int]) -> Tensor:
        """Class numbers (B,) of names or numbers.

        Raises:
            UserError: no such class; names the nearest.
        """
        networks: list[Any] = list(self.nets.values())
        highest = min((net.num_classes for net in networks if hasattr(net, "num_classes")), default=None)
        numbers = []
        for one in map(str, wanted):
            number = int(one) if one.isdecimal() else self.classes.get(one)
            if number is None:
                raise UserError(f"no class {one!r}; {registry.nearest(one, list(self.classes))} Numbers do, too.")
            if highest is not None and number >= highest:
                raise UserError(f"no class {one}; the network has 0 to {highest - 1}")
            numbers.append(number)
        return torch.tensor(numbers)

    @torch.no_grad()
    def latents(
        self,
        cond: Mapping[str, Tensor],
        *,
        seed: int,
        steps: int | None = None,
        guidance: float | None = None,
        batch: int = 64,
    ) -> Tensor:
        """Model-space samples (B, C, H, W), one a condition. Sample i depends on the seed and on i, not on `batch`."""
        count = len(next(iter(cond.values())))
        parts = []
        for begin in range(0, count, batch):
            positions = torch.arange(begin, min(begin + batch, count))
            rng = ProgressRng(seed, 0, "sample", positions, torch.device("cpu"))
            noise = rng.normal("noise", latent_shape(self.dataset, _input(self.objective)))
            part = {name: value[begin : begin + batch] for name, value in cond.items()}
            parts.append(
                sample_latents(
                    self.objective, self.nets, self.recipe, part, noise, steps=steps, guidance=guidance, rng=rng
                )
            )
        return torch.cat(parts)

    @cached_property
    def speaking(self) -> Speaking:
        return Speaking(self.recipe, self.place, self.dataset)

    @cached_property
    def voices(self) -> list[Voice]:
        """One of each held-out speaker; of the training data's where the recipe has no validation split."""
        split = "train" if self.recipe.data.validation is None else "validation"
        held_out = open_data(self.recipe, self.place.data_root, split)
        frames: int = getattr(self.objective, "prompt_frames", 0)
        return self.speaking.held_out(held_out, frames)

    @torch.no_grad()
    def speak(self, texts: Sequence[str], voices: Sequence[Voice], *, seed: int, batch: int = 16) -> list[Sound]:
        """Sentences, each in its voice. Sentence i depends on the seed and on i, not on `batch`.

        Raises:
            UserError: the run's family does not speak; a text that cannot be said.
        """
        if not hasattr(self.objective, "speak"):
            raise UserError(f"{self.run.path}: recipe {self.recipe.name} does not speak; it draws pictures")
        said: list[Sound] = []
        for begin in range(0, len(texts), batch):
            part = slice(begin, min(begin + batch, len(texts)))
            rng = ProgressRng(seed, 0, "sample", torch.arange(part.start, part.stop), torch.device("cpu"))
            sampler = sampler_of(self.recipe)
            said += self.speaking.say(self.objective, self.nets, texts[part], voices[part], sampler, rng)
        return said

    def require_decoder(self) -> None:
        """Raises a UserError where what the run draws cannot be shown: the recipe names no autoencoder."""
        if hasattr(self.objective, "predictor"):
            _ = self.decoder

    @cached_property
    def decoder(self) -> Callable[[Tensor], Tensor]:
        """Latents as the autoencoder gives them to pixels; raises a UserError where the recipe names none."""
        return _decoder(self.recipe, self.place, self.objective, self.dataset)

    @torch.no_grad()
    def decoded(self, latents: Tensor, batch: int = 32) -> Tensor:
        """Model-space latents -> images (B, 3, H, W) or clips (B, 3, F, H, W), float32 in [-1, 1], of values that eight bits hold."""
        stats = self.objective.latents  # type: ignore[attr-defined]
        parts = [self.decoder(denormalise(part, stats)).float() for part in latents.split(batch)]
        return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    def images(self, latents: Tensor) -> Tensor:
        """Model-space latents -> images (B, H, W, 3) uint8; of clips, strips of frames."""
        return to_uint8(self.decoded(latents))
