"""IP-Adapter: a picture as a prompt. Beside each attention to a text one to a picture's tokens learns, whose answers add up.

Source: Ye et al. 2023, "IP-Adapter: Text compatible image prompt adapter for text-to-image diffusion models"; the resampler of the plus
variant is Alayrac et al. 2022, "Flamingo".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Adapter, Cond, Network, UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.norms import AffineNorm
from nexus_scale.models.layers.place_transformer import Image
from nexus_scale.models.layers.tags import KeepsTags, tag_param

EPS = 1e-5
HEAD_DIM, MLP_RATIO = 64, 4
"""Of the resampler; other programs know no others."""


class ImageTokens(nn.Module):
    """A picture's embedding (B, image_dim) -> tokens (B, n, D): one linear layer and a norm."""

    def __init__(self, image_dim: int, tokens: int, text_dim: int):
        super().__init__()
        self.tokens = tokens
        self.proj = Linear(image_dim, tokens * text_dim)
        self.norm = AffineNorm(text_dim, EPS)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).unflatten(1, (self.tokens, -1)))


class ResamplerLayer(nn.Module):
    """Queries attend to a picture's tokens and to themselves, then an MLP; (B, n, W) and (B, L, W) -> (B, n, W)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_image, self.norm_queries, self.norm_mlp = (AffineNorm(width, EPS) for _ in range(3))
        self.q = Linear(width, num_heads * HEAD_DIM, bias=False)
        self.kv = Linear(width, 2 * num_heads * HEAD_DIM, bias=False)
        self.proj = Linear(num_heads * HEAD_DIM, width, bias=False)
        self.fc1 = Linear(width, MLP_RATIO * width, bias=False)
        self.fc2 = Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, queries: Tensor, image: Tensor) -> Tensor:
        x = self.norm_queries(queries)
        seen = torch.cat((self.norm_image(image), x), dim=1)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, n or L + n, E)
            for part in (self.q(x), *self.kv(seen).chunk(2, dim=-1))
        )
        queries = queries + self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return queries + self.fc2(F.gelu(self.fc1(self.norm_mlp(queries))))


class Resampler(KeepsTags):
    """A picture's states (B, L, image_dim) -> tokens (B, n, D), by queries that learn (the plus variant)."""

    def __init__(self, image_dim: int, tokens: int, text_dim: int, width: int, depth: int, num_heads: int):
        super().__init__()
        self.queries = tag_param(nn.Parameter(torch.empty(1, tokens, width)), decay=False)
        self.proj_in = Linear(image_dim, width)
        self.layers = nn.ModuleList(ResamplerLayer(width, num_heads) for _ in range(depth))
        self.proj_out = Linear(width, text_dim)
        self.norm = AffineNorm(text_dim, EPS)

    def forward(self, image: Tensor) -> Tensor:
        image, queries = self.proj_in(image), self.queries.repeat(len(image), 1, 1)
        for layer in self.layers:
            queries = layer(queries, image)
        return self.norm(self.proj_out(queries))


class Reader(nn.Module):
    """Keys and values of the picture's tokens beside one attention of the base."""

    def __init__(self, text_dim: int, hidden_size: int):
        super().__init__()
        self.kv = Linear(text_dim, 2 * hidden_size, bias=False)

    def forward(self, q: Tensor, image: Image) -> Tensor:
        """q (B, N, L, E) -> the same shape."""
        tokens, strength = image
        k, v = (part.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for part in self.kv(tokens).chunk(2, dim=-1))
        return attention(q, k, v) * strength


class IpAdapter(Adapter):
    """A picture as a prompt of a `unet_condition`: tokens of it, and keys and values beside each attention to the text.

    It begins as its base, or by `init_from` with the keys and values that the base has for its text. 22 M parameters beside Stable
    Diffusion 1.5.
    """

    def __init__(
        self,
        *,
        base: Callable[[], UNetCondition],
        condition: str = "image_prompt",
        image_dim: int = 1024,
        tokens: int = 4,
        resampler_depth: int = 0,
        resampler_width: int = 768,
        resampler_heads: int = 12,
    ):
        """
        Args:
            base: makes the adapted network; the program gives it.
            condition: the picture, by its name among the conditions: its embedding (B, image_dim), or with a resampler its states
                (B, L, image_dim). `<condition>_scale` (B,), where it is there, is how much of it counts.
            image_dim: width of the image encoder's embedding: 1024 of CLIP ViT-H, or of its states, 1280.
            tokens: n; 4, and 16 of the plus variant.
            resampler_depth: layers of the plus variant's resampler, 4 in what is published; 0: one linear layer in its place.
            resampler_width, resampler_heads: of it; heads are 64 wide.
        """
        super().__init__()
        with torch.device("meta"):
            made = base()
        if not isinstance(made, UNetCondition):
            raise UserError(f"ip_adapter: adapts a {type(made).__name__}; expected a unet_condition")
        if min(image_dim, tokens, resampler_width, resampler_heads) < 1 or resampler_depth < 0:
            raise UserError(
                f"ip_adapter: got image_dim {image_dim}, tokens {tokens}, resampler_width {resampler_width}, resampler_heads "
                f"{resampler_heads}, resampler_depth {resampler_depth}; expected at least 1, and of the last 0"
            )
        readers = made.readers()
        if not readers:
            raise UserError("ip_adapter: its base has no attention to a text; set transformer_depth")
        self.condition, self.image_dim, self.tokens_of_each = condition, image_dim, tokens
        self.resampler_depth, self.resampler_width, self.resampler_heads = (
            resampler_depth,
            resampler_width,
            resampler_heads,
        )
        self.image_embed: nn.Module = (
            Resampler(image_dim, tokens, made.text_dim, resampler_width, resampler_depth, resampler_heads)
            if resampler_depth
            else ImageTokens(image_dim, tokens, made.text_dim)
        )
        self.paths = tuple(readers)
        self.readers = nn.ModuleList(Reader(made.text_dim, reader.q.out_features) for reader in readers.values())
        self._hold(made)

    def _hold(self, base: UNetCondition) -> None:
        vars(self)["base"] = base  # not a part of this network: its parameters are its own
        attentions = base.readers()
        for path, reader in zip(self.paths, self.readers, strict=True):
            assert isinstance(reader, Reader)
            attentions[path].beside.append(partial(_read, self, reader))
        self.num_classes, self.together = base.num_classes, base.together

    def attach(self, base: Network) -> None:
        assert isinstance(base, UNetCondition)
        assert isinstance(self.base, UNetCondition)
        there, here = (
            {path: part.kv.weight.shape for path, part in one.readers().items()} for one in (base, self.base)
        )
        if there != here:
            raise ValueError(f"the adapter is for attentions to a text {here}; the base has {there}")
        self._hold(base)

    def through(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def told(x: Tensor, t: Tensor, cond: Cond, **more: Any) -> Any:
            if self.condition not in cond:
                raise ValueError(
                    f"no {self.condition!r} among the conditions {sorted(cond)}; add it to objective.conditions and to the data"
                )
            first = next(self.parameters())
            given = cond[self.condition]
            if given.ndim != (3 if self.resampler_depth else 2) or given.shape[-1] != self.image_dim:
                raise ValueError(
                    f"condition {self.condition!r} is {tuple(given.shape[1:])}; expected {'states (L, ' if self.resampler_depth else '('}"
                    f"{self.image_dim}): set image_dim and resampler_depth"
                )
            strength = cond.get(f"{self.condition}_scale")
            scale = given.new_ones(len(given)) if strength is None else strength
            image = self.image_embed(given.to(first.dtype)), scale.to(first.dtype).view(-1, 1, 1, 1)
            with self.at_work():
                return call(x, t, cond, image=image, **more)

        return told

    def init_weights(self) -> None:
        """Xavier; values start as zero, so that it begins as its base."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
            elif isinstance(module, AffineNorm):
                module.init_weights()
        if isinstance(self.image_embed, Resampler):
            nn.init.normal_(self.image_embed.queries, std=self.resampler_width**-0.5)
        with torch.no_grad():
            for reader in self.readers:
                assert isinstance(reader, Reader)
                reader.kv.weight[reader.kv.out_features // 2 :] = 0

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...] | None:
        found = self.base.example_inputs(batch_size, text_tokens, device, lengths)
        if found is None:
            return None
        x, t, cond = found
        shape = (257, self.image_dim) if self.resampler_depth else (self.image_dim,)
        return x, t, {**cond, self.condition: torch.zeros(batch_size, *shape, device=device)}


def _read(adapter: IpAdapter, reader: Reader, q: Tensor, image: Image) -> Tensor | None:
    out: Tensor | None = reader(q, image) if adapter.at_works else None
    return out
