"""SpectralCodec as a model of transformers whose code the folder carries, as tables; to the bit.

No published class is this codec: Vocos's decoder stands behind a residual quantiser and has an encoder before it.
"""

from __future__ import annotations

from operator import itemgetter

from nexus_scale.interop.formats import Format, Key
from nexus_scale.interop.published import Family

EXAMPLE = """import torch
from transformers import AutoModel

codec = AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
waves = torch.zeros(1, 1, codec.config.sampling_rate)  # (B, 1, T) in [-1, 1]
codes = codec.encode(waves).audio_codes  # (B, K, T')
again = codec.decode(codes).audio_values  # (B, 1, hop * T')
"""
TRANSFORMERS = Format(
    "spectral_codec",
    "SpectralCodec weights",
    lambda net: {name: name for name in net.state_dict()},
    "SpectralCodecModel",
    config={
        "sampling_rate": Key(24000, "sample_rate_hz"),
        "hop": Key(320, "hop"),
        "window": Key(1280, lambda net: net.encoder.frames.window),
        "hidden_channels": Key(384, lambda net: net.encoder.trunk.embed.out_channels),
        "mlp_channels": Key(1152, lambda net: net.encoder.trunk.blocks[0].up.out_features),
        "encoder_depth": Key(8, lambda net: len(net.encoder.trunk.blocks)),
        "decoder_depth": Key(8, lambda net: len(net.decoder.trunk.blocks)),
        "latent_channels": Key(128, lambda net: net.quantizer.codebooks.shape[2]),
        "num_codebooks": Key(8, "num_codebooks"),
        "codebook_size": Key(1024, "codebook_size"),
        "centred": Key(False, lambda net: net.encoder.centred),
        "tones": Key(0, lambda net: net.decoder.tones.count if net.decoder.tones else 0),
    },
    arguments={
        name: itemgetter(name)
        for name in (
            "window",
            "hidden_channels",
            "mlp_channels",
            "encoder_depth",
            "decoder_depth",
            "latent_channels",
            "centred",
            "tones",
        )
    },
    constants={
        "auto_map": {
            "AutoConfig": "spectral_codec.SpectralCodecConfig",
            "AutoModel": "spectral_codec.SpectralCodecModel",
        }
    },
    file="model.safetensors",
    part="codec",
    model_type="spectral_codec",
    carried=("spectral_codec.py",),
    example=EXAMPLE,
)
FAMILY = Family({"transformers": TRANSFORMERS})
