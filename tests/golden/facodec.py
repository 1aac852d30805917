"""What Amphion's FACodec computes in float64 with known weights on known sounds: `python -m tests.golden.facodec FOLDER`.

FOLDER holds its repository (github.com/open-mmlab/Amphion, commit d3de90f), of which models/codec/ns3_codec is imported; its imports for
spectrograms, which are not used here, are stood in for. Writes facodec.npz beside this file: latents, codes, timbre, waveforms, what the
attributes are asked, and of gradients of weighted sums of them, under our parameters' names, the first KEPT values.
"""

from __future__ import annotations

import sys
import types
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.models.audio.facodec import FACodec

FILE = Path(__file__).with_suffix(".npz")
SIZES: dict[str, Any] = {
    "strides": (2, 3), "base_channels": 2, "decoder_channels": 8, "latent_channels": 256, "codebook_size": 16, "codebook_dim": 4,
    "timbre_mlp_channels": 1024, "num_phones": 5003, "num_speakers": 245200, "dropout": 0.0,
    "reversed_from": ("detail_f0", "content_f0"),
}  # fmt: skip
"""The timbre's transformer is of one size there, and so are numbers of phones and speakers."""
KEPT = 64
CASES: dict[str, int] = {"one_step": 6, "odd": 42, "long": 120}
"""By name: samples of the sound."""
ASKED = {"f0": "f0", "detail_f0": "res_f0", "content_f0": "content_f0"}
COMPARED = (
    "encoder.conv_in.gain",
    "encoder.stages.1.resample.direction",
    "encoder.stages.0.units.2.snake1.frequency",
    "encoder.conv_out.bias",
    "quantizers.0.books.0.project_in.direction",
    "quantizers.1.books.1.project_out.gain",
    "quantizers.2.books.2.project_in.bias",
    "timbre.layers.0.qkv.weight",
    "timbre.layers.3.out.bias",
    "style.weight",
    "decoder.stages.0.resample.gain",
    "decoder.stages.1.units.1.conv1.direction",
    "decoder.snake.size",
    "heads.f0.units.0.conv2.gain",
    "heads.content_f0.answers.1.weight",
    "heads.detail_f0.snake.size",
)


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on the name alone, float32."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(generator.standard_normal(shape).astype(np.float32))


def codec() -> FACodec:
    """Known weights: the initial ones' sizes, drawn by name."""
    net = FACodec(**SIZES).eval()
    net.init_weights()
    with torch.no_grad():
        for key, p in net.named_parameters():
            wide = p.numel() // p.shape[0]
            scale = (
                1.0
                if key.endswith("entries")
                else 0.7
                if wide > 1 and key.endswith("direction")
                else wide**-0.5
                if wide > 1
                else 0.2
            )
            near = 1.0 if key.endswith("gain") or ("norm" in key and key.endswith("weight")) else 0.0
            if key.startswith("heads.phones.answers"):
                p.zero_()
                continue
            p.copy_(near + scale * drawn(key, tuple(p.shape)))
    return net.double()


def sound(name: str) -> Tensor:
    return 0.3 * drawn(f"{name}/sound", (1, 1, CASES[name])).double()


def computed(name: str, found: Mapping[str, Tensor]) -> Tensor:
    """The scalar whose gradients are compared: a weighted sum of what was found."""
    return torch.stack(
        [(value * drawn(f"{name}/{key}", tuple(value.shape))).sum() for key, value in sorted(found.items())]
    ).sum()


# ------------------------------------------------------------------------------------------- their side


def _public(folder: Path) -> Any:
    stood_in = {"pyworld": {}, "soundfile": {}, "torchaudio": {}, "torchaudio.functional": {"pitch_shift": None}}
    for module, names in {**stood_in, "librosa": {}, "librosa.filters": {"mel": None}}.items():
        made = types.ModuleType(module)
        vars(made).update(names)
        sys.modules[module] = made
    package = types.ModuleType("ns3_codec")
    package.__path__ = [str(folder / "models" / "codec" / "ns3_codec")]
    sys.modules["ns3_codec"] = package
    from ns3_codec import facodec  # type: ignore[import-not-found]

    return facodec


def _theirs(public: Any, net: FACodec) -> tuple[Any, Any]:
    from nexus_scale.interop.facodec import AMPHION

    sizes = net.attributes
    encoder = public.FACodecEncoder(
        ngf=SIZES["base_channels"], up_ratios=SIZES["strides"], out_channels=sizes.latent_channels
    )
    reversed_from = ("content_f0", "prosody_phone", "residual_f0", "residual_phone", "x_timbre")
    asked = {f"use_gr_{name}": name.replace("residual", "detail").replace("phone", "phones").replace("x_", "") in sizes.reversed_from
             for name in reversed_from}  # fmt: skip
    decoder = public.FACodecDecoder(
        in_channels=sizes.latent_channels, upsample_initial_channel=SIZES["decoder_channels"], up_ratios=SIZES["strides"][::-1],
        vq_dim=sizes.latent_channels, codebook_dim=sizes.codebook_dim, codebook_size_prosody=4, codebook_size_content=4,
        codebook_size_residual=4, use_random_mask_residual=False, **asked,
    )  # fmt: skip
    state = AMPHION.to_theirs(net.state_dict(), SIZES)[1]
    for prefix, part in (("encoder.", encoder), ("decoder.", decoder)):
        part.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        )
    return encoder.double().eval(), decoder.double().eval()


def _computed(encoder: Any, decoder: Any, name: str) -> Mapping[str, np.ndarray]:
    latents = encoder(sound(name))
    _, codes, _, quantised, timbre = decoder(latents, eval_vq=False, vq=True)
    told = decoder(latents, vq=False, quantized=quantised, speaker_embedding=timbre)
    found = {"latents": latents, "timbre": timbre, "x_hat": told["audio"]}
    for ours, theirs in ASKED.items():
        voiced = "uv" if theirs == "f0" else theirs.replace("f0", "uv")
        found[ours] = torch.stack([told[theirs], told[voiced]], dim=-1)
    computed(name, found).backward()
    return {
        "codes": codes.permute(1, 2, 0).numpy(),
        **{key: value.detach().float().numpy() for key, value in found.items()},
    }


def _gradients(encoder: Any, decoder: Any, net: FACodec) -> Mapping[str, np.ndarray]:
    from nexus_scale.interop.facodec import AMPHION

    theirs = {f"encoder.{key}": p.grad for key, p in encoder.named_parameters()}
    theirs |= {f"decoder.{key}": p.grad for key, p in decoder.named_parameters()}
    layout = AMPHION.layout(net)
    return {key: theirs[layout[key][0].key].flatten()[:KEPT].float().numpy() for key in COMPARED}


if __name__ == "__main__":
    found: dict[str, np.ndarray] = {}
    ours = codec()
    for case in CASES:
        both = _theirs(_public(Path(sys.argv[1])), ours)
        found |= {f"{case}/{key}": value for key, value in _computed(*both, case).items()}
        found |= {f"{case}/grad/{key}": value for key, value in _gradients(*both, ours).items()}
    np.savez_compressed(FILE, **found)
