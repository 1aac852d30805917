"""MusicGen against transformers' MusicgenForConditionalGeneration with the same weights: logits, loss, gradients, and what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Guidance, Request, UserError
from nexus_scale.interop.folders import write_json, write_tensors
from nexus_scale.interop.formats import Format
from nexus_scale.interop.init_from import InitFrom, opened
from nexus_scale.interop.published import family
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.audio.musicgen import MusicGen
from nexus_scale.objectives.autoregressive import Autoregressive
from nexus_scale.processes.codebooks import find_pattern
from nexus_scale.samplers.autoregressive import Autoregressive as Sampler

FORMS = family("musicgen").formats
TEXT = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
# frames of 16 samples at 32 kHz, whose four books of 16 are 32 kbit/s
CODEC: dict[str, Any] = {
    "num_filters": 2, "hidden_size": 4, "codebook_size": 16, "sampling_rate": 32000, "upsampling_ratios": [4, 4],
    "num_lstm_layers": 1, "target_bandwidths": [32.0],
}  # fmt: skip


def decoder(books: int, hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": 16, "num_hidden_layers": 2, "ffn_dim": 2 * hidden, "num_attention_heads": 2, "hidden_size": hidden,
        "num_codebooks": books, "pad_token_id": 16, "bos_token_id": 16, "dropout": 0.0,
    }  # fmt: skip


def theirs_of(books: int, hidden: int) -> Any:
    """Their model, of weights with which every part counts."""
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        T5Config,
    )

    torch.manual_seed(books + hidden)
    model = MusicgenForConditionalGeneration(
        MusicgenConfig(
            text_encoder=T5Config(**TEXT).to_dict(),
            audio_encoder=EncodecConfig(**CODEC).to_dict(),
            decoder=MusicgenDecoderConfig(**decoder(books, hidden)).to_dict(),
        )
    ).eval()
    return shaken(model)


def shaken(model: Any) -> Any:
    for name, p in model.named_parameters():
        if not name.startswith(("text_encoder.", "audio_encoder.")):
            nn.init.normal_(p, mean=float("norm.weight" in name), std=0.2)
    made = model.generation_config
    made.pad_token_id = made.bos_token_id = made.decoder_start_token_id = 16
    return model


def ours_of(theirs: Any, form: Format = FORMS["transformers"]) -> MusicGen:
    args, state = form.to_ours(theirs.config.to_dict(), theirs.state_dict())
    net: MusicGen = form.network_of(args).to_empty(device="cpu")
    net.load_state_dict(state)
    return net


@pytest.fixture(scope="module")
def pair() -> tuple[Any, MusicGen]:
    theirs = theirs_of(4, 32)
    return theirs, ours_of(theirs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def clips(books: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of three clips, their texts, of five tokens at most, and which of these are real."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (3, frames, books), generator=g)
    return codes, torch.randn(3, 5, 24, generator=g), torch.arange(5) < torch.tensor([5, 1, 3])[:, None]


@pytest.mark.parametrize(("books", "frames", "hidden"), [(4, 9, 32), (4, 1, 32), (2, 7, 24), (8, 5, 32)])
def test_logits_loss_and_gradients_are_theirs(books: int, frames: int, hidden: int) -> None:
    """24 is the text's own size, which is then not projected; eight books are those of two channels."""
    theirs = theirs_of(books, hidden)
    net, form = ours_of(theirs), FORMS["transformers"]
    codes, text, mask = clips(books, frames)
    delays = [k // 2 for k in range(books)] if books == 8 else list(range(books))
    steps, filled = find_pattern({"name": "delay", "delays": delays}, books).apply(codes, 16)
    tokens, targets = steps[:, :-1], steps[:, 1:]
    S = frames + max(delays)
    assert tokens.shape == (3, S, books)
    said = theirs(
        encoder_outputs=(text,), attention_mask=mask.long(), labels=targets,
        decoder_input_ids=tokens.transpose(1, 2).reshape(3 * books, S),
    )  # fmt: skip
    logits = net(tokens, {"text": text, "text_mask": mask})
    assert relative(logits, said.logits.view(3, books, S, 16).transpose(1, 2)) < 1e-5
    loss = nn.functional.cross_entropy(logits[filled[:, 1:]], targets[filled[:, 1:]])
    assert float(loss.detach()) == pytest.approx(float(said.loss.detach()), rel=1e-6)
    loss.backward()
    said.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    same = form.theirs_of(net, {name: p.grad for name, p in net.named_parameters()})
    assert grads.keys() == same.keys() and len(grads) > 30
    for name, grad in grads.items():
        assert relative(same[name], grad) < 1e-5 or float(grad.norm()) < 1e-6, name


@pytest.mark.parametrize(("width", "depth", "millions"), [(1024, 24, 419.6), (1536, 48, 1837.6), (2048, 48, 3255.4)])
def test_published_sizes(width: int, depth: int, millions: float) -> None:
    """Those of the decoder, without the projection of the text."""
    with torch.device("meta"):
        net = MusicGen(hidden_size=width, depth=depth, num_heads=width // 64)
    assert net.text_in is not None
    count = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.text_in.parameters())
    assert round(count / 1e6, 1) == millions


def test_step_by_step_is_all_at_once(pair: tuple[Any, MusicGen]) -> None:
    codes, text, mask = clips(4, 9)
    cond, net = {"text": text, "text_mask": mask}, pair[1]
    with torch.no_grad():
        whole = net(codes, cond)
        logits, memory = net.prefill(codes[:, :4], cond, 5)
        steps = [logits] + [net.extend(codes[:, step], memory) for step in range(4, 9)]
    assert relative(torch.stack(steps, dim=1), whole[:, 3:]) < 1e-6


@pytest.mark.parametrize(("scale", "begun"), [(1.0, 0), (3.0, 0), (3.0, 4)])
def test_what_is_drawn_is_theirs(pair: tuple[Any, MusicGen], scale: float, begun: int) -> None:
    """The likeliest codes, under guidance and after a given beginning, each of us with a cache of its own."""
    theirs, net = pair
    g = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(0, 50, (2, 5), generator=g), torch.arange(5) < torch.tensor([5, 2])[:, None]
    known = torch.randint(0, 16, (2, begun, 4), generator=g)
    given = {"decoder_input_ids": known.transpose(1, 2).reshape(8, begun)} if begun else {}
    drawn: list[Tensor] = []
    decode = theirs.audio_encoder.decode
    theirs.audio_encoder.decode = lambda codes, **more: drawn.append(codes) or decode(codes, **more)
    try:  # twelve steps are nine frames of four books, each a step later than the one before
        theirs.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, guidance_scale=scale, **given
        )
    finally:
        theirs.audio_encoder.decode = decode
    request = Request(
        sampler=Sampler(temperature=0, max_tokens=9),
        guidance=Guidance(scale),
        given={"codes": known} if begun else {},
    )
    objective = Autoregressive(codebook_size=16, conditions=("text",), condition_drop=0.3)
    with torch.no_grad():
        cond = {"text": theirs.text_encoder(input_ids=ids, attention_mask=mask.long())[0], "text_mask": mask}
        rng = ProgressRng(0, 0, "sample", torch.arange(2), torch.device("cpu"))
        made = objective.generate({"model": net}, cond, request, rng)
    assert made.samples.shape == (2, begun + 9, 4) and torch.equal(made.samples[:, :begun], known)
    assert torch.equal(made.samples, drawn[0][0].transpose(1, 2))


def test_their_folder_is_read_and_begins_a_run(pair: tuple[Any, MusicGen], tmp_path: Path) -> None:
    """The decoder of a whole folder, text encoder and codec left alone; and wrong ones are refused by name."""
    theirs, net = pair
    write_tensors(tmp_path / "model.safetensors", {k: v.clone() for k, v in theirs.state_dict().items()})
    write_json(tmp_path / "config.json", {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]})
    args, state = FORMS["transformers"].read(tmp_path)
    assert args["mlp_ratio"] == 2 and args["text_dim"] == 24
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value), name
    spec = InitFrom(format="transformers", path=str(tmp_path))
    with opened(spec, net, tmp_path) as read:
        own = net.heads.weight
        assert torch.equal(read("heads.weight", 5, 99), own.flatten()[5:99])
    other = opened(spec, MusicGen(**{**args, "num_heads": 4}), tmp_path)
    with pytest.raises(UserError, match=r"num_heads is 2 there and 4 in the recipe"), other:
        pass


@pytest.mark.parametrize("melody", [5, 9, 0])
def test_a_melody_models_logits_and_gradients_are_theirs(melody: int) -> None:
    """A melody shorter than its place is repeated, a longer one cut; none is the first pitch class throughout."""
    from transformers import (
        EncodecConfig,
        MusicgenMelodyConfig,
        MusicgenMelodyDecoderConfig,
        MusicgenMelodyForConditionalGeneration,
        T5Config,
    )

    theirs = MusicgenMelodyForConditionalGeneration(
        MusicgenMelodyConfig(
            text_encoder=T5Config(**TEXT).to_dict(),
            audio_encoder=EncodecConfig(**CODEC).to_dict(),
            decoder=MusicgenMelodyDecoderConfig(**decoder(4, 32)).to_dict(),
            chroma_length=7,
        )
    ).eval()
    shaken(theirs)
    form = family("musicgen_melody").formats["transformers"]
    net = ours_of(theirs, form)
    codes, _, mask = clips(4, 6)
    chroma = torch.eye(12)[torch.randint(0, 12, (3, melody))] if melody else None
    said = theirs(
        encoder_hidden_states=None, input_ids=torch.ones(3, 5, dtype=torch.int64), attention_mask=mask.long(),
        input_features=chroma, decoder_input_ids=codes.transpose(1, 2).reshape(12, 6),
    )  # fmt: skip
    states = theirs.text_encoder(input_ids=torch.ones(3, 5, dtype=torch.int64), attention_mask=mask.long())[0].detach()
    cond = {"text": states, "text_mask": mask, **({} if chroma is None else {"chroma": chroma})}
    logits, expected = net(codes, cond), said.logits.view(3, 4, 7 + 5 + 6, 16)[:, :, -6:].transpose(1, 2)
    assert relative(logits, expected) < 1e-5
    probe = torch.randn(logits.shape)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    same = form.theirs_of(net, {name: p.grad for name, p in net.named_parameters()})
    named = dict(theirs.named_parameters())
    assert len(same) > 20 and "audio_enc_to_dec_proj.weight" in same
    for name, grad in same.items():
        assert relative(grad, named[name].grad) < 1e-5, name
    with torch.no_grad():
        first, memory = net.prefill(codes[:, :2], cond, 4)
        steps = [first] + [net.extend(codes[:, step], memory) for step in range(2, 6)]
    assert relative(torch.stack(steps, dim=1), logits[:, 1:]) < 1e-6
