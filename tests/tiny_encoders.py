"""Tiny text encoders and an autoencoder with random weights, saved in the formats of transformers and diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "heart", "flag", "cat", "a", "of", "the", "big", "dog")


def save_tokenizer(folder: Path, kind: str, limit: int, words: Sequence[str] = WORDS) -> None:
    """A word-level tokenizer with the special tokens that each kind puts around a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    single = "$A [SEP]" if kind == "t5" else "[CLS] $A [SEP]"
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=limit
    )
    fast.save_pretrained(folder)


def save_text_encoder(folder: Path, kind: str, seed: int = 0, words: Sequence[str] = WORDS, t5_width: int = 12) -> Path:
    """`t5`, `clip` (with projection), `clip_plain` or `bert`."""
    import transformers as hf

    torch.manual_seed(seed)
    vocabulary = len(words)
    model: torch.nn.Module
    if kind == "t5":
        model = hf.T5EncoderModel(
            hf.T5Config(vocab_size=vocabulary, d_model=t5_width, d_kv=4, d_ff=16, num_layers=2, num_heads=3)
        )
    elif kind.startswith("clip"):
        config = hf.CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            projection_dim=6,
            max_position_embeddings=10,
            eos_token_id=3,
            bos_token_id=2,
            pad_token_id=0,
        )
        model = (hf.CLIPTextModel if kind == "clip_plain" else hf.CLIPTextModelWithProjection)(config)
    else:
        model = hf.BertModel(
            hf.BertConfig(
                vocab_size=vocabulary,
                hidden_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=12,
            )
        )
    model.save_pretrained(folder)
    save_tokenizer(folder, kind, {"t5": 10**30, "bert": 512}.get(kind, 10), words)
    return folder


def save_autoencoder_kl(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder)
    return folder


def save_image_encoder(folder: Path, seed: int = 0) -> Path:
    """CLIP's vision tower of random weights, 6 numbers of a picture of 8 x 8, with its image processor."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)
    return folder
