"""Image-to-image translation without pairs: two generators that undo each other, each with a critic of what it makes.

Source: Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", sections 3 and 4, appendix 7;
pools: Shrivastava et al. 2017, "Learning from Simulated and Unsupervised Images through Adversarial Training", section 2.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
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
from nexus_scale.kernels.transfer import to_device
from nexus_scale.objectives.patch_losses import IMAGE, SOURCE, PatchLosses, distance, fooled, judged
from nexus_scale.processes.pixels import mirrored, pixels_of

GENERATORS, CRITICS = "generators", "critics"
POOLS = (f"pool/{IMAGE}", f"pool/{SOURCE}")
FILLED = "pool/filled"


class CycleGAN(Objective):
    """`model: model(source) -> image` and `back: back(image) -> source`; `critic` judges images, `source_critic` sources, by logits of
    patches (B, 1, h, w). Sources and images of a batch have nothing to do with each other.

    generators' loss = the critics' parts + cycle_weight * |back(model(source)) - source| + identity_weight * |model(image) - image|, and
    the same the other way round, each a mean; critics' loss = half of the sum over data and translations, of each critic. What critics are
    shown of translations is drawn from a pool of earlier ones. Draws, by name: `mirror <field>`, and of all ranks `<pool>`.
    """

    def __init__(
        self,
        *,
        global_batch: int,
        image_shape: tuple[int, ...],
        losses: PatchLosses = "least_squares",
        cycle_weight: float = 10.0,
        identity_weight: float = 5.0,
        pool_size: int = 50,
        mirror: bool = False,
        validates: Literal["cycles", "pairs"] = "cycles",
    ):
        """
        Args:
            global_batch: the recipe's.
            image_shape: (C, H, W) of images and of sources, for the pools.
            identity_weight: of images that are translated as if they were sources: they are to stay as they are. 0: never computed.
            pool_size: translations of each kind that are remembered; 0: critics see those of the step.
            mirror: flip each training image left to right with probability 1/2.
            validates: `pairs`: a source and an image of a validation sample belong together, which training never learns; `cycles`: not.
        """
        if min(cycle_weight, identity_weight, pool_size) < 0 or len(image_shape) != 3 or min(image_shape) < 1:
            raise UserError(
                f"objective: got cycle_weight {cycle_weight}, identity_weight {identity_weight}, pool_size {pool_size}, image_shape "
                f"{tuple(image_shape)}; expected 0 or more of each, and (C, H, W), each at least 1"
            )
        self.global_batch, self.image_shape, self.losses = global_batch, tuple(image_shape), losses
        self.cycle_weight, self.identity_weight, self.pool_size = cycle_weight, identity_weight, pool_size
        self.mirror, self.validates = mirror, validates
        if pool_size:
            self.kept.update({name: torch.zeros(pool_size, *self.image_shape) for name in POOLS})
        self._filled = 0  # of a pool's places; on the host, which reads nothing of a device in a step
        self._draw = -1  # the global batch of the two below
        self._shown: dict[int, Tensor] = {}  # by a micro-batch's first position: (2, B, C, H, W), images before sources
        self._positions: list[Tensor] = []

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "back", "critic", "source_critic")

    @property
    def fields(self) -> Sequence[str]:
        return (SOURCE, IMAGE)

    def phases(self, step: int) -> Sequence[Phase]:
        return (
            Phase(GENERATORS, trains=("model", "back")),
            Phase(CRITICS, trains=("critic", "source_critic"), draws=False),
        )

    # ------------------------------------------------------------------------------------------- training

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of `generators`: `loss` and its parts `adversarial`, `cycle`, `identity`, unweighted sums of both
        ways; of `critics`: `loss`, and `real`, `fake`, their mean logits."""
        source, image = (self._clean(batch, rng, name) for name in (SOURCE, IMAGE))
        if phase == CRITICS:
            return self._critics(nets, source, image, batch)
        made, back = nets["model"](source).float(), nets["back"](image).float()
        parts = {
            "adversarial": fooled(self.losses, nets["critic"](made)) + fooled(self.losses, nets["source_critic"](back)),
            "cycle": (distance(nets["back"](made), source) + distance(nets["model"](back), image)).mean(),
        }
        total = parts["adversarial"] + self.cycle_weight * parts["cycle"]
        if self.identity_weight:
            parts["identity"] = (distance(nets["model"](image), image) + distance(nets["back"](source), source)).mean()
            total = total + self.identity_weight * parts["identity"]
        if batch.draw != self._draw:
            self._draw, self._shown, self._positions = batch.draw, {}, []
        self._shown[int(batch.positions[0])] = torch.stack([made.detach(), back.detach()])
        self._positions.append(batch.positions)
        return Loss(total, {name: value.detach() for name, value in {"loss": total, **parts}.items()})

    def _clean(self, batch: Batch, rng: Rng, name: str) -> Tensor:
        """Images in [-1, 1]; with `mirror`, each is mirrored with probability 1/2.

        Raises:
            UserError: they are not of `image_shape`.
        """
        x = pixels_of(batch, name)
        if tuple(x.shape[1:]) != self.image_shape:
            raise UserError(f"objective.image_shape: got {self.image_shape}; field {name} is {tuple(x.shape[1:])}")
        return mirrored(x, rng, f"mirror {name}") if self.mirror else x

    def _critics(self, nets: Nets, source: Tensor, image: Tensor, batch: Batch) -> Loss:
        made, back = self._shown[int(batch.positions[0])]
        losses, means = [], []
        for name, data, translated in (("critic", image, made), ("source_critic", source, back)):
            real, fake = nets[name](data), nets[name](translated)
            losses.append(judged(self.losses, real, fake))
            means.append(torch.stack([real.float().mean(), fake.float().mean()]))
        total = losses[0] + losses[1]
        real, fake = torch.stack(means).detach().mean(0)
        return Loss(total, {"loss": total.detach(), "real": real, "fake": fake})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """After the generators' phase the translations of all ranks go through the pools, the same on all of them."""
        own, self._positions = self._positions, []
        if phase != GENERATORS or not self.pool_size or not own:
            return {}
        mine = torch.cat([self._shown[int(positions[0])] for positions in own], dim=1)
        places = to_device(torch.cat(own), mine.device)
        everyone = mine.new_zeros(2, self.global_batch, *self.image_shape).index_copy(1, places, mine)
        everyone = sum_over_ranks(everyone).nan_to_num()  # a step that is skipped leaves nothing that is no image
        shown = torch.stack([self._pooled(name, new, rng) for name, new in zip(POOLS, everyone, strict=True)])
        self._filled = min(self.pool_size, self._filled + self.global_batch)
        for positions in own:
            self._shown[int(positions[0])] = shown[:, to_device(positions, mine.device)]
        return {}

    def _pooled(self, name: str, new: Tensor, rng: Rng) -> Tensor:
        """What critics are shown in place of new translations (n, C, H, W), like them. The pool remembers what it should.

        A pool that has room takes a translation and shows it. A full one shows with probability 1/2 one of its own, whose place the new one
        takes, and otherwise the new one.
        """
        size, filled, generator = self.pool_size, self._filled, rng.shared(name)
        draws = torch.rand(len(new), generator=generator).tolist()
        chosen = torch.randint(size, (len(new),), generator=generator).tolist()
        held, shown = list(range(size)), []  # numbers of images: the pool's own, then new ones
        for number, (draw, place) in enumerate(zip(draws, chosen, strict=True), start=size):
            if filled < size:
                held[filled], filled = number, filled + 1
                shown.append(number)
            elif draw < 0.5:
                shown.append(held[place])
                held[place] = number
            else:
                shown.append(number)
        images = torch.cat([to_device(self.kept[name], new.device), new])
        self.kept[name] = images[to_device(torch.tensor(held), new.device)]
        return images[to_device(torch.tensor(shown), new.device)]

    def state_dict(self) -> dict[str, Tensor]:
        filled = {FILLED: torch.tensor(self._filled)} if self.pool_size else {}
        return {**super().state_dict(), **filled}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != FILLED})
        self._filled = int(state.get(FILLED, 0))
        self._draw, self._shown, self._positions = -1, {}, []

    # ------------------------------------------------------------------------------------------- validation, generation

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """Mean absolute errors, each (B,): `cycle`, of both ways there and back. With pairs, `loss` is that of translated sources,
        `loss_zero` of grey, `identity` of sources left as they are, and `back` of translated images; otherwise `loss` is `cycle`, and
        `loss_zero` that of grey."""
        source, image = pixels_of(batch, SOURCE), pixels_of(batch, IMAGE)
        made, back = nets["model"](source).float(), nets["back"](image).float()
        cycle = 0.5 * (distance(nets["back"](made), source) + distance(nets["model"](back), image))
        grey = [x.abs().flatten(1).mean(1) for x in (source, image)]
        if self.validates == "cycles":
            return {"loss": cycle, "loss_zero": 0.5 * (grey[0] + grey[1]), "cycle": cycle}
        found = {"loss": distance(made, image), "loss_zero": grey[1], "identity": distance(source, image)}
        return {**found, "back": distance(back, source), "cycle": cycle}

    @property
    def draws(self) -> Draws:
        """Translations of sources, or with `reverse` of images."""
        return Draws(IMAGE, takes=frozenset({"image", "reverse"}), given=(SOURCE,))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        source = pixels_of(batch, SOURCE)
        return {}, replace(request, shape=tuple(source.shape[1:]), given={SOURCE: source})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The translation of each source that is given, or where images are given, of each image: (B, C, H, W) in [-1, 1]."""
        if SOURCE in request.given:
            return Generated(nets["model"](request.given[SOURCE]).float())
        return Generated(nets["back"](request.given[IMAGE]).float())
