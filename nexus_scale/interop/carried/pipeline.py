"""The pipeline of this folder: diffusers' own, which tells the network of a text what its training told it.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    images = pipeline("red heart", seed=0).images

diffusers' pipelines read prompts with encoders of their own, pad them, and guide away from an empty prompt. This one reads them with the
encoders of this folder, shows the network real tokens alone, and guides away from as many tokens of zeros as stood for "no text" in
training, however long the prompt beside them. It needs torch, numpy, diffusers and transformers.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline as Base
from torch import Tensor

TRAINED: dict[str, Any] = {}
"""What the run was told and how it draws; `nexus export` writes it here."""

T5_TOKENS = 512
NO_LIMIT = 1_000_000
COMPONENTS = [
    name for name, its in inspect.signature(Base.__init__).parameters.items() if not isinstance(its.default, bool)
]
"""What the pipeline is made of; truth values are settings."""
SHARED = ("img_ids", "txt_ids")
"""What the network is given once for all samples."""


class TrainedPipeline(Base):
    """See the module's docstring."""

    # of the class, since diffusers runs the file of the next folder in this module
    told = TRAINED
    part = "unet" if "unet" in inspect.signature(Base.__init__).parameters else "transformer"
    _optional_components = sorted(set(COMPONENTS) - {"self", part})

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        """Of any type: text encoders and autoencoder are the run's."""
        return dict.fromkeys(inspect.signature(cls.__init__).parameters, (inspect.Signature.empty,))

    @property
    def network(self) -> Any:
        """What is trained."""
        return getattr(self, self.part)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """What the base class returns.

        Args:
            prompt: texts; or `prompt_embeds` (B, L, D) of real tokens, with `pooled_prompt_embeds` where the network has them.
            negative_prompt: one, or one for each prompt; None: no text, as in training.
            seed: draws image i from the noise of sample i of `nexus sample --seed`.
            options: the base class's; steps, guidance and size are the recipe's unless given.
        """
        if prompt is None and options.get("prompt_embeds") is None:
            raise ValueError("give a prompt, or prompt_embeds")
        own = {**self.told["defaults"], **options}
        prompts = [prompt] if isinstance(prompt, str) else prompt
        times = [int(own.pop(name, None) or 1) for name in ("num_images_per_prompt", "num_videos_per_prompt")]
        texts = self._texts(prompts, negative_prompt, own)
        # The base class repeats prompts, not embeddings.
        own |= {name: value.repeat_interleave(max(times), dim=0) for name, value in texts.items()}
        if seed is not None and own.get("latents") is None:
            own["latents"] = self._noise(seed, len(own["prompt_embeds"]), own)
        takes = inspect.signature(Base.__call__).parameters
        for kind in ("", "negative_"):
            if f"{kind}prompt_attention_mask" in takes and own.get(f"{kind}prompt_embeds") is not None:
                own[f"{kind}prompt_attention_mask"] = (~own[f"{kind}prompt_embeds"][..., 0].isnan()).long()
        if "use_resolution_binning" in takes:
            # PixArt's bins are the sizes of another training, and an empty prompt is its default
            own = {"use_resolution_binning": False, "negative_prompt": None, **own}
        with self._real_text_alone():
            return super().__call__(**own)

    # ------------------------------------------------------------------------------------------------ texts

    def _texts(
        self, prompts: Sequence[str] | None, negative: str | Sequence[str] | None, own: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Embeddings of prompts, and with guidance of what is guided away from, padded with NaN to one length."""
        if prompts is not None:
            tokens, pooled = self._all_encoded(prompts)
        else:
            tokens, pooled = list(own.pop("prompt_embeds").split(1)), own.pop("pooled_prompt_embeds", None)
        named = {"": (tokens, pooled)}
        guided = "negative_prompt_embeds" in inspect.signature(Base.__call__).parameters
        if guided and own.get(self.told["guidance"], 1.0) > 1.0:
            named["negative_"] = self._negatives(negative, tokens, pooled, own)
        longest = max(one.shape[1] for rows, _ in named.values() for one in rows)
        given = {
            f"{kind}prompt_embeds": torch.cat([_padded(one, longest) for one in rows])
            for kind, (rows, _) in named.items()
        }
        given |= {f"{kind}pooled_prompt_embeds": pool for kind, (_, pool) in named.items() if pool is not None}
        return {name: value.to(self._execution_device, self.network.dtype) for name, value in given.items()}

    def _negatives(
        self, negative: str | Sequence[str] | None, tokens: list[Tensor], pooled: Tensor | None, own: dict[str, Any]
    ) -> tuple[list[Tensor], Tensor | None]:
        """What each sample is guided away from: a negative prompt, embeddings that are given, or no text."""
        if negative is not None:
            return self._all_encoded([negative] * len(tokens) if isinstance(negative, str) else negative)
        if own.get("negative_prompt_embeds") is not None:
            return list(own.pop("negative_prompt_embeds").split(1)), own.pop("negative_pooled_prompt_embeds", None)
        if self.told.get("null") == "empty":
            return self._all_encoded([""] * len(tokens))
        nothing = [torch.zeros_like(one[:, :1]).expand(-1, self.told["null_tokens"], -1) for one in tokens]
        return nothing, None if pooled is None else torch.zeros_like(pooled)

    def _all_encoded(self, texts: Sequence[str]) -> tuple[list[Tensor], Tensor | None]:
        """Real tokens (1, L, D) of each text, and pooled texts (B, Dp)."""
        rows = [self._encoded(text) for text in texts]
        pools = [pooled for _, pooled in rows if pooled is not None]
        return [tokens for tokens, _ in rows], torch.cat(pools) if pools else None

    def _encoded(self, text: str) -> tuple[Tensor, Tensor | None]:
        """Real tokens (1, L, D) and the pooled text (1, Dp) of a prompt, None without one, as the network sees them."""
        if self.told["texts"] is None:
            raise ValueError("the text encoders are not in this folder (see README.md): give prompt_embeds")
        fields: dict[str, Tensor] = {}
        for one in self.told["texts"]:
            tokens, pooled = self._states(one, text)
            names = dict(zip(one["fields"], (tokens, pooled), strict=True))
            fields |= {
                name: value for name, value in names.items() if name in self.told["conditions"] and value is not None
            }
        tokens = fields["text"]
        if "text_2" in fields:  # two encoders that read the same tokens stand side by side
            length = min(tokens.shape[1], fields["text_2"].shape[1])
            tokens = torch.cat((tokens[:, :length], fields["text_2"][:, :length]), dim=-1)
        if "text_2" in fields or "text_3" in fields:
            tokens = F.pad(tokens, (0, self.told["text_dim"] - tokens.shape[-1]))
        if "text_3" in fields:  # a third one's follow
            third = F.pad(fields["text_3"], (0, tokens.shape[-1] - fields["text_3"].shape[-1]))
            tokens = torch.cat((tokens, third), dim=1)
        pools = [fields[name] for name in ("pooled", "pooled_2", "pooled_3") if name in fields]
        return tokens, torch.cat(pools, dim=-1) if pools else None

    def _states(self, one: Mapping[str, Any], text: str) -> tuple[Tensor, Tensor | None]:
        """One encoder's token states and pooled text, rounded as the training data were."""
        tokenizer, encoder = getattr(self, one["tokenizer"]), getattr(self, one["encoder"])
        length = one["max_tokens"] or _limit(one["kind"], tokenizer, encoder.config)
        padding = "max_length" if one["padded"] else False
        ids = tokenizer([text], truncation=True, max_length=length, padding=padding, return_tensors="pt").input_ids
        ids = ids.to(encoder.device)
        out = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        tokens, pooled = out.last_hidden_state, None
        if one["kind"] == "clip":
            embedded = out.get("text_embeds")
            tokens = out.last_hidden_state if one.get("states") == "last" else out.hidden_states[-2]
            pooled = out.pooler_output if embedded is None else embedded
        elif one["kind"] == "bert":
            pooled = F.normalize(tokens.mean(dim=1), dim=-1)
        stored = getattr(torch, one["dtype"])
        tokens = tokens.to(stored).float()[:, : one["length"]]
        return tokens, None if pooled is None else pooled.to(stored).float()

    @contextmanager
    def _real_text_alone(self) -> Iterator[None]:
        """Within it, the network sees no token that is NaN: samples of one length are computed together."""
        network = self.network
        forward, before = network.forward, network.__dict__.get("forward")

        def cut(*latents: Tensor, **given: Any) -> tuple[Tensor]:
            given |= dict(zip(inspect.signature(forward).parameters, latents, strict=False))
            given.pop("encoder_attention_mask", None)  # nothing that is left is masked
            text = given["encoder_hidden_states"]
            lengths = (~text[..., 0].isnan()).sum(1).tolist()
            found: dict[int, Tensor] = {}
            for length in sorted(set(lengths)):
                rows = [row for row, own in enumerate(lengths) if own == length]
                found |= dict(zip(rows, self._of_length(forward, _rows(given, rows, len(text)), length), strict=True))
            return (torch.stack([found[row] for row in range(len(text))]),)

        network.forward = cut
        try:
            yield
        finally:
            if before is None:
                del network.forward
            else:
                network.forward = before

    def _of_length(self, forward: Callable[..., Any], given: dict[str, Any], length: int) -> Tensor:
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :length]
        if given.get("txt_ids") is not None:
            given["txt_ids"] = given["txt_ids"][:length]
        patches: Any = getattr(self.network, "patch_embed", None)
        longest, table = getattr(patches, "max_text_seq_length", None), getattr(patches, "pos_embedding", None)
        if longest is None:
            return forward(**given)[0]
        try:  # positions of text are zeros there, as many as there may be text
            patches.max_text_seq_length = length
            if table is not None:
                patches.pos_embedding = table[:, longest - length :]
            return forward(**given)[0]
        finally:
            patches.max_text_seq_length = longest
            if table is not None:
                patches.pos_embedding = table

    # ------------------------------------------------------------------------------------------------ noise

    def _noise(self, seed: int, count: int, own: Mapping[str, Any]) -> Tensor:
        """The noise that `nexus sample --seed` draws its first `count` samples from, as the base class takes it."""
        shape, (height, width) = list(self.told["shape"]), self.told["size"]
        if len(shape) == 4 and own.get("num_frames"):
            shape[1] = (own["num_frames"] - 1) // self.vae_scale_factor_temporal + 1
        shape[-2] = shape[-2] * (own.get("height") or height) // height
        shape[-1] = shape[-1] * (own.get("width") or width) // width
        noise = torch.stack([noise_of(seed, position, shape) for position in range(count)])
        noise = noise.to(self._execution_device, self.network.dtype)
        if noise.ndim == 5:
            return noise.transpose(1, 2)  # frames before channels
        pack = getattr(self, "_pack_latents", None)
        return noise if pack is None else pack(noise, *noise.shape)


def noise_of(seed: int, position: int, shape: Sequence[int]) -> Tensor:
    """Standard normal draws of a shape by Philox4x64 and Box-Muller, on the CPU."""
    digest = hashlib.blake2b(repr((seed, 0, "sample", "sample", "noise")).encode(), digest_size=16).digest()
    size = math.prod(shape)
    blocks, half = max(1, -(-size // 8)), (size + 1) // 2 if size > 8 else 4
    philox = np.random.Philox(key=np.frombuffer(digest, "<u8"), counter=position * blocks)
    words = np.asarray(philox.random_raw(4 * blocks)).view(np.int32).reshape(-1, 2)[:half]
    numbers = torch.from_numpy(words).double()
    radius = (-2 * torch.log(numbers[:, 0] * 2.0**-32 + (0.5 + 2.0**-32))).sqrt()
    angle = numbers[:, 1] * (2 * math.pi * 2.0**-32)
    return torch.cat((radius * angle.cos(), radius * angle.sin())).float()[:size].view(*shape)


def _limit(kind: str, tokenizer: Any, config: Any) -> int:
    """Tokens that an encoder takes at most."""
    own = int(tokenizer.model_max_length)
    if kind == "t5":
        return own if own < NO_LIMIT else T5_TOKENS
    # those number positions from the padding index + 1
    return min(own, config.max_position_embeddings - 2 * (config.model_type in ("roberta", "xlm-roberta", "mpnet")))


def _padded(tokens: Tensor, length: int) -> Tensor:
    return F.pad(tokens.float(), (0, 0, 0, length - tokens.shape[1]), value=math.nan)


def _rows(given: Mapping[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The arguments of some samples."""
    return {
        name: _rows(value, rows, count)
        if isinstance(value, Mapping)
        else value[rows]
        if torch.is_tensor(value) and value.ndim and len(value) == count and name not in SHARED
        else value
        for name, value in given.items()
    }
