"""Feature extractors by name: what metrics compare images, clips and sounds by, each from a package, a local file or a local folder.

    {name: inception, file: weights-inception-2015-12-05-6726825d.pth, resize: tensorflow}   FID, sFID, KID, Inception score
    {name: efficientnet_lite0}                                                               FID-like, from its package
    {name: clip, folder: PATH}, {name: dinov2, folder: PATH}                                 CMMD, CLIP score; FD-DINOv2
    {name: i3d, file: i3d_torchscript.pt, sha256: ...}, {name: videomae, folder: PATH}       FVD
    {name: clap, folder: PATH}, {name: codec, folder: PATH}, {name: codec, run: NAME}        FAD
    {name: speech, folder: PATH, layer: 9}                                                   Fréchet distance of speech

`find_extractor` says what is missing, with the file that is expected and where it is published, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.interop.encoders import (
    TextEncoder,
    find_text_encoder,
    open_codec,
)
from nexus_scale.interop.folders import parsed_config, weight_files
from nexus_scale.interop.image_encoders import ImageEncoder, find_image_encoder
from nexus_scale.interop.libraries import transformers_library
from nexus_scale.interop.speech_features import loaded_model, open_features
from nexus_scale.metrics.features import (
    Compute,
    Extractor,
    bytes_of,
    find_efficientnet,
    find_inception,
    fingerprint_of,
    sha256_of,
)

PUBLISHED = {
    "clip": "https://huggingface.co/openai/clip-vit-large-patch14 (CMMD: clip-vit-large-patch14-336)",
    "dinov2": "https://huggingface.co/facebook/dinov2-large",
    "i3d": "https://github.com/universome/fvd-comparison (i3d_torchscript.pt)",
    "videomae": "https://huggingface.co/MCG-NJU/videomae-large-finetuned-kinetics",
    "clap": "https://huggingface.co/laion/larger_clap_music",
    "codec": "https://huggingface.co/facebook/encodec_24khz",
    "speech": "https://huggingface.co/microsoft/wavlm-large",
}
"""A published folder or file of each kind."""

MODEL_TYPES = {
    "clip": ("clip", "clip_vision_model"),
    "dinov2": ("dinov2", "dinov2_with_registers"),
    "videomae": ("videomae",),
    "clap": ("clap", "clap_audio_model"),
}
"""`model_type` of config.json, by the name in the spec. The folder never chooses a class."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "inception": ("file", "resize"),
    "efficientnet_lite0": (),
    "clip": ("folder",),
    "dinov2": ("folder",),
    "i3d": ("file", "sha256"),
    "videomae": ("folder",),
    "clap": ("folder",),
    "codec": ("folder", "run"),
    "speech": ("folder", "layer"),
}
"""What a spec may say beside its name."""


def find_extractor(
    spec: Mapping[str, Any], root: Path, runs_root: Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """What a spec names, found and not loaded; see the module.

    Args:
        root: where relative files and folders start.
        runs_root: where runs lie, for `{name: codec, run: NAME}`.
    Raises:
        UserError: an unknown name or key, or what is not there; says what is expected and where it is published.
    """
    name = str(spec.get("name"))
    if name not in KEYS:
        raise UserError(f"features: no {name!r}; {nearest(name, list(KEYS))}")
    for key in spec:
        if key not in ("name", *KEYS[name]):
            raise UserError(f"features {name}: unknown key {key!r}; {nearest(str(key), ['name', *KEYS[name]])}")
    if name == "efficientnet_lite0":
        return find_efficientnet(device)
    if name == "codec":
        return _codec(spec, root, runs_root or Path("runs"), device)
    place = _place(name, spec, root)
    if name == "inception":
        return find_inception(place, str(spec.get("resize", "tensorflow")), device)
    if name == "i3d":
        return _torchscript(place, spec.get("sha256"), device)
    if name == "speech":
        return _speech(place, spec, device)
    kind = parsed_config(place, f"a model of transformers, such as {PUBLISHED[name]}").get("model_type")
    if kind not in MODEL_TYPES[name]:
        raise UserError(
            f"{place / 'config.json'}: model_type is {kind!r}; expected {' or '.join(MODEL_TYPES[name])}", 3
        )
    made: Mapping[str, Callable[..., Extractor]] = {
        "clip": _images,
        "dinov2": _images,
        "videomae": _videos,
        "clap": _sounds,
    }
    return made[name](name, place, device)


def find_clip_texts(
    spec: Mapping[str, Any], root: Path, device: torch.device | str = "cpu"
) -> Callable[[Sequence[str]], Tensor]:
    """The text tower of `{name: clip, folder: PATH}`: texts -> embeddings (B, D) beside those of its images; loaded when first called.

    Raises:
        UserError: no such folder, or one without texts.
    """
    found = find_text_encoder({"folder": str(_place("clip", spec, root)), "dtype": "float32"})
    loaded: list[TextEncoder] = []

    def embed(texts: Sequence[str]) -> Tensor:
        if not loaded:
            loaded.append(TextEncoder(found, device=device))
        pooled = [states.pooled for states in loaded[0].encode(texts)]
        return torch.stack([torch.from_numpy(one) for one in pooled if one is not None])

    return embed


def _place(name: str, spec: Mapping[str, Any], root: Path) -> Path:
    key = "file" if "file" in KEYS[name] else "folder"
    if key not in spec:
        raise UserError(
            f"features {name}: no {key}; name a local one, such as {PUBLISHED.get(name, 'the published weights')}"
        )
    place = root / str(spec[key])
    if not place.exists() and name != "inception":
        raise UserError(f"{place}: not there; expected a {key} of {name}, such as {PUBLISHED[name]}", 3)
    return place


def _images(name: str, folder: Path, device: torch.device | str) -> Extractor:
    """CLIP's projected embedding, or the last state of a ViT's class token behind its norm; scaled as the folder's processor says."""
    found = find_image_encoder({"folder": str(folder)})

    def load() -> Compute:
        encoder = ImageEncoder({"folder": str(folder)}, device=str(device))
        return lambda images: {"features": encoder.encode(list(bytes_of(images).cpu()))}

    return Extractor(f"{name} of {folder.name}", found.fingerprint, "images", "features", load)


def _torchscript(file: Path, sha256: Any, device: torch.device | str) -> Extractor:
    """The I3D of FVD. A TorchScript file is a program: the user vouches for it by its hash."""
    found = sha256_of(file)
    if sha256 != found:
        raise UserError(
            f"{file}: a TorchScript file is a program that runs with your rights; its sha256 is {found}, and the spec says {sha256}: "
            "name it as `sha256` where you trust the file"
        )

    def load() -> Compute:
        try:
            net = torch.jit.load(str(file), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{file}: cannot be read as TorchScript ({str(error)[:200]})", 3) from None

        def compute(clips: Tensor) -> Mapping[str, Tensor]:
            pixels = bytes_of(clips).to(device).float()
            made: Tensor = net(pixels, rescale=True, resize=True, return_features=True)
            return {"features": made.flatten(1)}

        return compute

    return Extractor(f"I3D of {file.name}", fingerprint_of(file, "i3d"), "clips", "features", load)


def _videos(name: str, folder: Path, device: torch.device | str) -> Extractor:
    """The mean of VideoMAE's last states over all places, as its classifiers take it."""
    config, files = parsed_config(folder, "VideoMAEModel"), weight_files(folder, "model.safetensors")
    prepared = parsed_config(folder, "VideoMAEImageProcessor", "preprocessor_config.json")
    frames, side = int(config["num_frames"]), int(config["image_size"])
    mean, std = (torch.tensor(prepared[key]).view(3, 1, 1, 1) for key in ("image_mean", "image_std"))

    def load() -> Compute:
        net = loaded_model(folder, "VideoMAEModel").to(device)

        def compute(clips: Tensor) -> Mapping[str, Tensor]:
            if clips.shape[2] != frames:
                raise UserError(
                    f"{folder}: reads clips of {frames} frames; got {clips.shape[2]}: FVD states its clip length"
                )
            pixels = bytes_of(clips).float() / 255
            resized = F.interpolate(
                pixels.transpose(1, 2).flatten(0, 1), (side, side), mode="bilinear", antialias=True, align_corners=False
            ).unflatten(0, (len(clips), frames))
            scaled = (resized - mean.transpose(0, 1)) / std.transpose(0, 1)  # (B, F, 3, H, W)
            return {"features": net(scaled.to(device)).last_hidden_state.mean(1).float()}

        return compute

    fingerprint = fingerprint_of(
        {file.name: file for file in (folder / "config.json", *files)}, f"{name} {side} {frames}"
    )
    return Extractor(f"VideoMAE of {folder.name}, clips of {frames} frames", fingerprint, "clips", "features", load)


def _sounds(name: str, folder: Path, device: torch.device | str) -> Extractor:
    """CLAP's audio embedding of each sound."""
    files = weight_files(folder, "model.safetensors")
    prepared = parsed_config(folder, "ClapFeatureExtractor", "preprocessor_config.json")
    rate = int(prepared["sampling_rate"])

    def load() -> Compute:
        library = transformers_library()
        net = loaded_model(folder, "ClapAudioModelWithProjection").to(device)
        heard = library.ClapFeatureExtractor.from_pretrained(str(folder), local_files_only=True)

        def compute(waves: Tensor) -> Mapping[str, Tensor]:
            if waves.shape[1] > heard.nb_max_samples:  # it would hear a random part
                seconds, most = waves.shape[1] / rate, heard.nb_max_samples / rate
                raise UserError(f"{folder}: hears at most {most:g} s; got {seconds:g} s: cut the sounds")
            inputs = heard([wave.cpu().numpy() for wave in waves], sampling_rate=rate, return_tensors="pt").to(device)
            return {"features": net(**inputs).audio_embeds.float()}

        return compute

    names = (folder / "config.json", folder / "preprocessor_config.json", *files)
    fingerprint = fingerprint_of({file.name: file for file in names}, name)
    return Extractor(f"CLAP of {folder.name}", fingerprint, "sounds", "features", load, rate)


def _codec(spec: Mapping[str, Any], root: Path, runs_root: Path, device: torch.device | str) -> Extractor:
    """Latents of a codec's encoder, before they are quantised: a row for each step of each sound, as FAD has it."""
    codec = open_codec({key: spec[key] for key in ("folder", "run") if key in spec}, runs_root, root, device)

    encoder = getattr(codec.network, "encoder", None)
    if encoder is None:
        raise UserError(
            f"features codec: {dict(spec)} makes its codes without an encoder of waveforms; name another codec"
        )

    def compute(waves: Tensor) -> Mapping[str, Tensor]:
        latents = encoder(waves[:, None].to(device)).float()  # (B, D, T')
        return {"features": latents.transpose(1, 2).flatten(0, 1)}

    name = f"codec of {spec.get('run') or Path(str(spec.get('folder'))).name}"
    return Extractor(name, codec.fingerprint, "sounds", "features", lambda: compute, codec.sample_rate_hz)


def _speech(folder: Path, spec: Mapping[str, Any], device: torch.device | str) -> Extractor:
    """The mean over time of a layer of a speech encoder."""
    states = open_features({"folder": str(folder), "layer": spec.get("layer")}, Path(), device)

    def compute(waves: Tensor) -> Mapping[str, Tensor]:
        return {"features": torch.stack([states.of(wave.cpu()).mean(0) for wave in waves])}

    name = f"speech encoder of {folder.name}, layer {spec.get('layer', 'last')}"
    return Extractor(name, states.fingerprint, "sounds", "features", lambda: compute, states.sample_rate_hz)
