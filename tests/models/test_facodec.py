"""FACodec against what Amphion's computes (golden numbers), its published names and size, and what training asks of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.interop.facodec import AMPHION
from nexus_scale.models.audio.facodec import FACodec
from nexus_scale.models.audio.factorised import reversed_gradient
from nexus_scale.models.audio.quantization import Seen
from nexus_scale.models.audio.spectral_facodec import SpectralFACodec
from tests.distributed import run_ranks
from tests.golden import facodec as golden

SMALL: dict[str, Any] = {
    "strides": (2, 4),
    "base_channels": 2,
    "decoder_channels": 8,
    "latent_channels": 16,
    "codebook_size": 16,
    "codebook_dim": 4,
    "timbre_depth": 1,
    "timbre_heads": 2,
    "timbre_mlp_channels": 16,
    "dropout": 0.0,
    "num_phones": 7,
    "num_speakers": 3,
    "reversed_from": ("timbre", "prosody_phones", "content_f0", "detail_f0", "detail_phones"),
    "speaker_head": True,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(**changes: Any) -> FACodec:
    torch.manual_seed(0)
    net = FACodec(**(SMALL | changes))
    net.init_weights()
    return net


def error(got: torch.Tensor, expected: np.ndarray) -> float:
    theirs = torch.from_numpy(expected)
    assert got.shape == theirs.shape
    return float((got.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 2e-4)], ids=["float64", "float32"])
def test_latents_codes_timbre_sound_and_gradients_are_amphions(dtype: torch.dtype, most: float) -> None:
    stored, net = np.load(golden.FILE, allow_pickle=False), golden.codec().to(dtype)
    for name in golden.CASES:
        net.zero_grad()
        x = golden.sound(name).to(dtype)
        made = net(x)
        found = {"latents": made.latents, "timbre": made.parts.timbre, "x_hat": made.x_hat}
        found |= {key: made.told[key] for key in golden.ASKED}
        assert np.array_equal(made.parts.codes.numpy(), stored[f"{name}/codes"]), name
        golden.computed(name, found).backward()
        parameters = dict(net.named_parameters())
        found |= {f"grad/{key}": parameters[key].grad.flatten()[: golden.KEPT] for key in golden.COMPARED}
        with torch.no_grad():  # as inference goes: codes and a voice, and back
            assert error(net.decode(net.encode(x), net.voice(x)), stored[f"{name}/x_hat"]) < most
        assert {key: e for key, value in found.items() if (e := error(value, stored[f"{name}/{key}"])) > most} == {}, (
            name
        )


def test_published_size_and_names() -> None:
    with torch.device("meta"):
        net = FACodec()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert sum(counts.values()) == PUBLISHED["encoder"] + PUBLISHED["decoder"]
    assert counts["encoder"] == PUBLISHED["encoder"]
    assert net.hop == 200 and net.num_codebooks == 6
    theirs = {one.key: tuple(one.shape) for parts in AMPHION.layout(net).values() for one in parts}
    assert AMPHION.args_of_shapes(theirs) == {
        "strides": (2, 4, 5, 5), "base_channels": 32, "decoder_channels": 1024, "latent_channels": 256, "prosody_books": 1,
        "content_books": 2, "detail_books": 3, "codebook_size": 1024, "codebook_dim": 8, "timbre_depth": 4, "timbre_mlp_channels": 1024,
        "num_phones": 5003, "num_speakers": 245200, "reversed_from": ("timbre", "detail_f0", "detail_phones"),
    }  # fmt: skip


PUBLISHED = {"encoder": 4_210_528, "decoder": 98_120_652}
"""Parameters of Amphion's FACodecEncoder and FACodecDecoder with the settings of its README."""


def test_what_is_exported_is_read_again_without_the_head_that_theirs_lacks() -> None:
    net = make()
    _, theirs = AMPHION.to_theirs(net.state_dict(), SMALL)
    _, state = AMPHION.to_ours(None, theirs, {**SMALL, "speaker_head": False})
    assert set(net.state_dict()) - set(state) == {"heads.speaker.weight", "heads.speaker.bias"}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())


def test_reconstruction_and_questions_move_what_they_should() -> None:
    net = make()
    x = 0.3 * torch.randn(2, 1, 77, generator=torch.Generator().manual_seed(0))
    made = net(x, torch.tensor([1.0, 0.0]))
    assert made.x_hat.shape == x.shape and made.parts.codes.shape == (2, 10, 6)
    assert {name: tuple(value.shape[1:]) for name, value in made.told.items()} == {
        "f0": (10, 2), "phones": (10, 7), "speaker": (3,), "timbre": (3,), "prosody_phones": (10, 7), "content_f0": (10, 2),
        "detail_f0": (10, 2), "detail_phones": (10, 7),
    }  # fmt: skip

    def moved(value: torch.Tensor) -> set[int]:
        net.zero_grad()
        value.square().sum().backward(retain_graph=True)
        return {k for k, books in enumerate(net.quantizers) if books.books[0].project_out.direction.grad is not None
                and bool(books.books[0].project_out.direction.grad.any())}  # fmt: skip

    assert moved(made.x_hat[:1]) == {2} and moved(made.x_hat[1:]) == set()
    assert moved(made.told["f0"]) == {0} and moved(made.told["content_f0"]) == {1}
    # the same answer from a source without the reversal has the other gradient, in float64
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (z.sin() * weight).sum().backward()
    plain, z.grad = z.grad, None
    (reversed_gradient(z).sin() * weight).sum().backward()
    assert plain is not None and torch.equal(-plain, z.grad)


FOLLOWING: dict[str, Any] = {
    "hop": 8, "window": 32, "hidden_channels": 8, "mlp_channels": 16, "encoder_depth": 1, "decoder_depth": 1, "latent_channels": 16,
    "detail_books": 1, "codebook_size": 16, "codebook_dim": 4, "timbre_depth": 1, "timbre_heads": 2, "timbre_mlp_channels": 16,
    "num_phones": 7, "num_speakers": 3, "reversed_from": (), "codebook_decay": 0.8, "dead_below": 3.0, "kmeans_iterations": 3,
}  # fmt: skip


def followed(rank: int, world_size: int) -> list[Any]:
    """Books that followed three global batches of four sounds, of which each rank has its share, and what each step said."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = SpectralFACodec(**FOLLOWING)
    net.init_weights()
    assert net.quantizer is not None and not any(name.endswith("entries") for name, _ in net.named_parameters())
    mine = torch.arange(4).chunk(world_size)[rank]

    def summed(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if world_size > 1:
            torch.distributed.all_reduce(value)
        return value

    said = []
    for step in range(3):
        x = torch.randn(4, 1, 200, generator=torch.Generator().manual_seed(step)).cumsum(-1).sin()[mine]
        made = net(x)
        if step == 0:  # the books are empty: what comes in passes
            low = made.parts.low[:, :4].transpose(1, 2)
            assert torch.equal(made.parts.attributes[0].transpose(1, 2), net.quantizers[0].books[0].project_out(low))
        seen = [Seen(made.parts.low.detach(), made.parts.codes, mine)]
        found = net.quantizer.follow(seen, summed, torch.Generator().manual_seed(step))
        said.append([float(value[0] if isinstance(value, tuple) else value) for value in found.values()])
    if world_size == 1:
        with torch.no_grad():
            made = net.eval()(x)
        assert torch.allclose(net.decode(net.encode(x), net.voice(x))[..., :200], made.x_hat, atol=1e-5)
        assert float(made.parts.commitment.mean()) > 0 and not made.parts.codebook.any()
        assert torch.allclose(net.phones(made.parts.codes), made.told["phones"], atol=1e-5)
    return [net.quantizer.codebooks.flatten().tolist(), said]


def test_books_that_follow_use_their_entries_and_are_the_same_of_one_worker_and_of_two() -> None:
    """They begin by k-means, and entries that nothing chooses are moved."""
    books, said = followed(0, 1)
    assert all(perplexity > 8 for perplexity, _ in said) and said[0][1] == 1 and 0 < said[1][1] < 1
    one, other = run_ranks(2, followed)
    assert one == other
    assert one[0] == pytest.approx(books, rel=1e-5, abs=1e-6)
    assert np.allclose(one[1], said, rtol=1e-5)


def test_sizes_that_cannot_be_are_refused_by_name() -> None:
    for changes, named in (
        ({"codebook_decay": 1.0}, r"spectral_facodec\.codebook_decay: got 1\.0"),
        ({"dead_below": -1.0}, "spectral_facodec: got codebook_size 16, kmeans_iterations 3, dead_below -1"),
    ):
        with pytest.raises(UserError, match=named):
            SpectralFACodec(**(FOLLOWING | changes))
    for changes, named in (
        ({"latent_channels": 6}, "facodec.latent_channels"),
        ({"reversed_from": ("pitch",)}, "facodec.reversed_from"),
        ({"detail_books": 0}, "facodec.reversed_from"),
        ({"decoder_channels": 3}, "facodec.decoder_channels"),
        ({"dropout": 1.0}, "facodec.dropout"),
    ):
        with pytest.raises(UserError, match=named):
            make(**changes)
