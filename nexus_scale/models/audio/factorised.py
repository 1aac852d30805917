"""The common part of codecs that keep the attributes of speech apart: prosody, content, detail, and the speaker's timbre.

Each attribute is quantised by books of its own. Small networks say what an attribute must tell (phones by the content, pitch by the
prosody, the speaker by the timbre) and, behind a reversed gradient, what others must not.

Source: Ju et al. 2024, "NaturalSpeech 3", section 3.2, as Amphion's ns3_codec computes it; Ganin & Lempitsky 2015 (reversed gradients);
Yu et al. 2021 and Kumar et al. 2023 (books of few dimensions, looked up by direction).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.norms import layer_norm
from nexus_scale.models.audio.convnext import TimeConv
from nexus_scale.models.audio.quantization import FollowingBooks, ParallelQuantizer, check_following, nearest
from nexus_scale.models.audio.snake import SmoothSnake, SnakeUnit
from nexus_scale.models.audio.waveforms import SoundCodec
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.norms import AffineNorm
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.weight_normed import Normed

Reversed = Literal["timbre", "prosody_phones", "content_f0", "detail_f0", "detail_phones"]
REVERSED: tuple[str, ...] = get_args(Reversed)
KERNEL, EPS = 5, 1e-5


class Attributes(NamedTuple):
    """Sizes of the attributes.

    Attributes:
        latent_channels: D, of latents and of the timbre.
        prosody_books, content_books, detail_books: books of each attribute, in this order among the codes; of detail there may be none.
        codebook_size: V.
        codebook_dim: of an entry.
        timbre_depth, timbre_heads, timbre_mlp_channels: of the transformer that hears the timbre.
        dropout: in that transformer.
        num_phones: that content tells.
        num_speakers: that timbre tells, and must not be told without it.
        reversed_from: what is to be unlearnt: the speaker by what is decoded before it is told the timbre (`timbre`), phones by prosody
            and detail, pitch by content and detail.
        speaker_head: whether the timbre is asked for the speaker; the released model's is not.
        codebook_decay: None: entries learn by gradients and are looked up by direction, as the released model's. Else books begin by
            k-means and follow what they code by moving averages, of which this part stays after a step; see `FollowingBooks`, for
            `dead_below` and `kmeans_iterations`, too. In a run of minutes gradients leave most entries unused: 3 to 17 of 256 were.
    """

    latent_channels: int
    prosody_books: int
    content_books: int
    detail_books: int
    codebook_size: int
    codebook_dim: int
    timbre_depth: int
    timbre_heads: int
    timbre_mlp_channels: int
    dropout: float
    num_phones: int
    num_speakers: int
    reversed_from: tuple[str, ...]
    speaker_head: bool
    codebook_decay: float | None = None
    dead_below: float = 2.0
    kmeans_iterations: int = 50

    @property
    def books(self) -> tuple[int, int, int]:
        return self.prosody_books, self.content_books, self.detail_books

    def check(self, name: str) -> None:
        """Raises a UserError that names the argument of the network."""
        counts = {
            key: value for key, value in self._asdict().items() if isinstance(value, int) and key != "speaker_head"
        }
        check_counts(name, counts, {"detail_books": 0, "kmeans_iterations": 0})
        if self.codebook_decay is not None:
            check_following(name, self.codebook_size, self.codebook_decay, self.dead_below, self.kmeans_iterations)
        if self.latent_channels % (2 * self.timbre_heads):
            raise UserError(
                f"{name}.latent_channels: got {self.latent_channels} with timbre_heads {self.timbre_heads}; expected a multiple of "
                f"{2 * self.timbre_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"{name}.dropout: got {self.dropout}; expected a share in [0, 1)")
        unknown = [one for one in self.reversed_from if one not in REVERSED]
        if unknown or len(set(self.reversed_from)) < len(self.reversed_from):
            raise UserError(
                f"{name}.reversed_from: got {list(self.reversed_from)}; expected different ones of {', '.join(REVERSED)}"
            )
        if not self.detail_books and any(one.startswith("detail") for one in self.reversed_from):
            raise UserError(
                f"{name}.reversed_from: got {list(self.reversed_from)} with detail_books 0; leave detail out"
            )


class Parts(NamedTuple):
    """A sound's attributes: `prosody`, `content` and `detail` as quantised, (B, D, T') each, with the gradient of what came in; `codes`
    (B, T', K) of all; `timbre` (B, D); `commitment` and `codebook`, (B,), mean over books: how far what came in is from its entries, for
    the one and for the other to learn; `low` (B, K * dim, T'), what all books code."""

    attributes: tuple[Tensor, Tensor, Tensor]
    codes: Tensor
    timbre: Tensor
    commitment: Tensor
    codebook: Tensor
    low: Tensor


class Factored(NamedTuple):
    """x_hat: like x; latents (B, D, T'); `parts`; `told`: what the attributes were asked, by name: `f0`, `content_f0`, `detail_f0`
    (B, T', 2), the pitch and whether there is one, `phones`, `prosody_phones`, `detail_phones` (B, T', P) logits, `speaker` and `timbre`
    (B, S) logits; those of `reversed_from` behind reversed gradients."""

    x_hat: Tensor
    latents: Tensor
    parts: Parts
    told: dict[str, Tensor]


class FactorisedCodec(SoundCodec):
    """(B, 1, T) <-> codes (B, T', K) of prosody, content and detail, T' = ceil(T / hop), and the timbre (B, D).

    Where T is a multiple of the hop, this is what Amphion's encoder and decoder compute of one sound at a time: in a batch, theirs adds
    to the timbre's transformer the sinusoids of a sample's place in the batch, ours those of the first of them to all.

    Args:
        encoder: (B, 1, T) -> (B, D, T / hop).
        decoder: (B, D, T') -> (B, 1, hop * T').
        attributes: see `Attributes`.
        hop: samples that a code stands for.
        sample_rate_hz: of the waveforms; the network does not look at it, whoever reads its codes does.
        segment_seconds: length that FLOPs are counted for.
    Raises:
        UserError: sizes that cannot be.
    """

    quantizers: Any
    heads: Any

    def __init__(
        self,
        *,
        name: str,
        encoder: nn.Module,
        decoder: nn.Module,
        attributes: Attributes,
        hop: int,
        sample_rate_hz: int,
        segment_seconds: float,
    ):
        attributes.check(name)
        super().__init__(
            hop=hop,
            sample_rate_hz=sample_rate_hz,
            audio_channels=1,
            segment_seconds=segment_seconds,
            num_codebooks=sum(attributes.books),
            codebook_size=attributes.codebook_size,
        )
        self.attributes = attributes
        D = attributes.latent_channels
        self.encoder, self.decoder = encoder, decoder
        V, dim, learned = attributes.codebook_size, attributes.codebook_dim, attributes.codebook_decay is None
        self.quantizers = nn.ModuleList(Books(D, count, V, dim, learned) for count in attributes.books)
        self.quantizer: ParallelQuantizer | None = None
        if attributes.codebook_decay is not None:
            self.quantizer = ParallelQuantizer(
                num_codebooks=self.num_codebooks, codebook_size=V, dim=dim, decay=attributes.codebook_decay,
                dead_below=attributes.dead_below, kmeans_iterations=attributes.kmeans_iterations,
            )  # fmt: skip
        self.begins = (0, attributes.prosody_books, attributes.prosody_books + attributes.content_books)
        self.timbre = Timbre(
            D, attributes.timbre_depth, attributes.timbre_heads, attributes.timbre_mlp_channels, attributes.dropout
        )
        self.style = Linear(D, 2 * D)
        self.heads = nn.ModuleDict({name: self._head(name) for name in self.asked})

    @property
    def timbre_size(self) -> int:
        """D, of the timbre."""
        return self.attributes.latent_channels

    @property
    def speaker_head(self) -> bool:
        """See `Attributes`."""
        return self.attributes.speaker_head

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of what the attributes are asked."""
        return ("f0", "phones", *(("speaker",) if self.attributes.speaker_head else ()), *self.attributes.reversed_from)

    def _head(self, name: str) -> nn.Module:
        D, sizes = self.attributes.latent_channels, self.attributes
        if name == "speaker":
            return Linear(D, sizes.num_speakers)
        if name == "timbre":
            return Asked(D, (sizes.num_speakers,), whole=True)
        return Asked(D, (sizes.num_phones,) if name.endswith("phones") else (1, 1))

    # ------------------------------------------------------------------------------------------ coding

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Factored:
        """
        Args:
            x: waveforms in [-1, 1], (B, 1, T).
            shown: (B,), 1 for samples that are rebuilt with their detail, 0 for those without; None: all with it. Reconstruction moves
                neither prosody nor content, which learn from what they are asked alone.
        """
        latents = self._latents(x)
        parts = self._parts(latents)
        prosody, content, detail = parts.attributes
        detail_shown = detail if shown is None else detail * shown[:, None, None].to(detail.dtype)
        mixed = prosody.detach() + content.detach() + detail_shown
        x_hat = self._rebuilt(mixed, parts.timbre)[..., : x.shape[-1]]
        return Factored(x_hat, latents, parts, self._told(parts, mixed))

    def encode(self, x: Tensor) -> Tensor:
        """Waveforms (B, 1, T) -> codes (B, ceil(T / hop), K) int64: prosody, content, detail."""
        return self._parts(self._latents(x)).codes

    def voice(self, x: Tensor) -> Tensor:
        """Waveforms (B, 1, T) -> timbre (B, D)."""
        found: Tensor = self.timbre(self._latents(x))
        return found

    def phones(self, codes: Tensor) -> Tensor:
        """What the content of codes (B, T', K) says at each step: logits of phones, (B, T', P)."""
        first, count, _ = self.attributes.books
        content = self.quantizers[1].decode(codes[..., first : first + count], self.quantizer, first)
        answer: Tensor = self.heads["phones"](content)
        return answer

    def decode(self, codes: Tensor, timbre: Tensor | None = None) -> Tensor:
        """Codes (B, T', K') of the first K' books, and a timbre (B, D) -> waveforms (B, 1, hop * T').

        Raises:
            UserError: no timbre.
            ValueError: more books than there are, or a code beyond the books.
        """
        if timbre is None:
            raise UserError(
                "codec: its codes say what is said and how, not by whom; they become sound with a timbre, which a recipe of "
                "naturalspeech3 gives"
            )
        self.check_codes(codes)
        mixed = torch.zeros((), device=codes.device)
        for books, first in zip(self.quantizers, self.begins, strict=True):
            own = codes[..., first : first + len(books.books)]
            mixed = mixed + books.decode(own, self.quantizer, first) if own.shape[2] else mixed
        return self._rebuilt(mixed, timbre)

    def _latents(self, x: Tensor) -> Tensor:
        self.check_waves(x)
        latents: Tensor = self.encoder(F.pad(x, (0, -x.shape[-1] % self.hop)))
        return latents

    def _parts(self, latents: Tensor) -> Parts:
        prosody, content = (self.quantizers[k](latents, self.quantizer, self.begins[k]) for k in (0, 1))
        left = latents - (prosody.latents + content.latents).detach()
        detail = self.quantizers[2](left, self.quantizer, self.begins[2])
        found = (prosody, content, detail)
        K = self.num_codebooks
        return Parts(
            (prosody.latents, content.latents, detail.latents),
            torch.cat([one.codes for one in found], dim=2),
            self.timbre(latents),
            torch.stack([one.commitment for one in found]).sum(0) / K,
            torch.stack([one.codebook for one in found]).sum(0) / K,
            torch.cat([one.low for one in found], dim=2).transpose(1, 2),
        )

    def _rebuilt(self, mixed: Tensor, timbre: Tensor) -> Tensor:
        """The waveform of what is said and how, (B, D, T'), in a voice (B, D): a norm that is told the timbre, and the decoder."""
        scale, shift = self.style(timbre)[:, None].chunk(2, dim=-1)  # (B, 1, D)
        normed = layer_norm(mixed.transpose(1, 2), None, None, EPS) * scale + shift
        waves: Tensor = self.decoder(normed.transpose(1, 2))
        return waves

    def _told(self, parts: Parts, mixed: Tensor) -> dict[str, Tensor]:
        prosody, content, detail = parts.attributes
        sources = {"f0": prosody, "phones": content, "speaker": parts.timbre, "timbre": mixed}
        sources |= {"prosody_phones": prosody, "content_f0": content, "detail_f0": detail, "detail_phones": detail}
        told = {}
        for name in self.asked:
            source = reversed_gradient(sources[name]) if name in self.attributes.reversed_from else sources[name]
            told[name] = self.heads[name](source)
        return told

    # ------------------------------------------------------------------------------------------ the network

    def init_weights(self) -> None:
        """Weight-normed layers keep a signal's size, linears begin as torch's, entries N(0, 1); the timbre's norm as a plain one."""
        for module in self.modules():
            if isinstance(module, Linear | TimeConv):
                bound = module.weight[0].numel() ** -0.5
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Normed | SmoothSnake | AffineNorm | Book):
                module.init_weights()
        with torch.no_grad():
            self.style.bias[: self.attributes.latent_channels] = 1.0


class ReversedGradient(torch.autograd.Function):
    """x, whose gradient comes back with the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


reversed_gradient: Callable[[Tensor], Tensor] = ReversedGradient.apply


# ------------------------------------------------------------------------------------------------- books


class Looked(NamedTuple):
    """latents (B, D, T) as quantised, with the gradient of what came in; codes (B, T, K); `commitment` and `codebook` (B,), sums over
    books of mean squared distances; `low` (B, T, K * dim), what each book codes."""

    latents: Tensor
    codes: Tensor
    commitment: Tensor
    codebook: Tensor
    low: Tensor


class NormedLinear(Normed):
    """A weight-normed linear over the last dimension."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__((out_features, in_features), out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kernel(), self.bias)


class Book(KeepsTags, nn.Module):
    """V entries of few dimensions between two projections: (B, T, D) -> (B, T, D). Its own entries are looked up by direction and learn
    by gradients; without `learned`, they are those of book `k` of `following`."""

    def __init__(self, latent_channels: int, size: int, dim: int, learned: bool):
        super().__init__()
        self.project_in, self.project_out = NormedLinear(latent_channels, dim), NormedLinear(dim, latent_channels)
        # an entry that a batch lacks would decay without learning
        self.entries = tag_param(nn.Parameter(torch.empty(size, dim)), decay=False) if learned else None

    def forward(self, x: Tensor, following: FollowingBooks | None, k: int) -> tuple[Tensor, ...]:
        """The quantised latents, codes (B, T), for each sample what the latents and what the entries have to move, (B,), and what is
        coded (B, T, dim)."""
        low = self.project_in(x)  # (B, T, dim)
        if self.entries is None:
            assert following is not None
            passed, code, commitment = following.looked_up(low, k)
            return self.project_out(passed), code, commitment, torch.zeros_like(commitment), low
        code = nearest(F.normalize(low, dim=-1), F.normalize(self.entries, dim=-1))
        entry = F.embedding(code, self.entries)
        commitment = (low - entry.detach()).square().mean((1, 2))
        codebook = (entry - low.detach()).square().mean((1, 2))
        return self.project_out(low + (entry - low).detach()), code, commitment, codebook, low

    def decode(self, code: Tensor, following: FollowingBooks | None, k: int) -> Tensor:
        """(B, T) -> (B, T, D)."""
        entries = self.entries if following is None else following.codebooks[k]
        assert entries is not None
        return self.project_out(F.embedding(code, entries))

    def init_weights(self) -> None:
        if self.entries is not None:
            nn.init.normal_(self.entries)


class Books(nn.Module):
    """Books one after another, each coding what those before it leave: (B, D, T). There may be none. Where entries are those of
    `following`, the first book's are there at `first`."""

    books: Any

    def __init__(self, latent_channels: int, count: int, size: int, dim: int, learned: bool):
        super().__init__()
        self.books = nn.ModuleList(Book(latent_channels, size, dim, learned) for _ in range(count))

    def forward(self, z: Tensor, following: FollowingBooks | None, first: int) -> Looked:
        left = z.transpose(1, 2)  # (B, T, D)
        total, none = torch.zeros_like(left), left.new_zeros(len(left))
        codes, commitments, codebooks, lows = [], [none], [none], [left[..., :0]]
        for k, book in enumerate(self.books, start=first):
            found, code, commitment, codebook, low = book(left, following, k)
            left, total = left - found, total + found
            codes.append(code)
            commitments.append(commitment)
            codebooks.append(codebook)
            lows.append(low)
        stacked = torch.stack(codes, dim=-1) if codes else left.new_zeros(*left.shape[:2], 0, dtype=torch.int64)
        moves = torch.stack(commitments).sum(0), torch.stack(codebooks).sum(0)
        return Looked(total.transpose(1, 2), stacked, *moves, torch.cat(lows, dim=-1))

    def decode(self, codes: Tensor, following: FollowingBooks | None, first: int) -> Tensor:
        """Codes (B, T, K') of the first books, at least one -> latents (B, D, T)."""
        some = enumerate(zip(self.books, codes.unbind(-1), strict=False), start=first)
        found = [book.decode(code, following, k) for k, (book, code) in some]
        return torch.stack(found).sum(0).transpose(1, 2)


# ------------------------------------------------------------------------------- timbre, and what is asked


class TimbreBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), whose first layer is a convolution: (B, T, D) -> (B, T, D)."""

    def __init__(self, channels: int, num_heads: int, mlp_channels: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = AffineNorm(channels, EPS), AffineNorm(channels, EPS)
        self.qkv, self.proj = Linear(channels, 3 * channels), Linear(channels, channels)
        self.conv, self.out = TimeConv(channels, mlp_channels, KERNEL), Linear(mlp_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + F.dropout(y, self.dropout, self.training)
        y = F.relu(self.conv(self.norm2(x).transpose(1, 2)).transpose(1, 2))
        return x + self.out(F.dropout(y, self.dropout, self.training))


class Timbre(nn.Module):
    """Latents (B, D, T') -> the mean over time of what a transformer makes of them, (B, D)."""

    def __init__(self, channels: int, depth: int, num_heads: int, mlp_channels: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(TimbreBlock(channels, num_heads, mlp_channels, dropout) for _ in range(depth))
        self.norm = AffineNorm(channels, EPS)

    def forward(self, latents: Tensor) -> Tensor:
        x = latents.transpose(1, 2)  # (B, T', D)
        # Amphion's sinusoids are those of place 0 for all steps of a sound: zeros and ones in turn
        x = x + torch.arange(x.shape[2], device=x.device).remainder(2).to(x.dtype)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        mean: Tensor = self.norm(x).mean(1)
        return mean


class Asked(nn.Module):
    """What an attribute tells, step by step, (B, D, T') -> (B, T', sum of sizes), or of the `whole` sound, (B, sum of sizes)."""

    def __init__(self, channels: int, sizes: Sequence[int], *, whole: bool = False):
        super().__init__()
        self.whole = whole
        self.units = nn.ModuleList(SnakeUnit(channels, dilation) for dilation in (1, 2, 3))
        self.snake = SmoothSnake(channels)
        self.answers = nn.ModuleList(Linear(channels, size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        steps = self.snake(x).transpose(1, 2)  # (B, T', D)
        heard = steps.mean(1) if self.whole else steps
        return torch.cat([answer(heard) for answer in self.answers], dim=-1)
