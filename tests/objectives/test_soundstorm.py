"""SoundStorm: what it hides and asks for is what a public implementation does; sentences are read, and spoken in a voice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.config.recipe import load_recipe
from nexus_scale.contracts import Batch, Request, UserError
from nexus_scale.data.sounds import encode_wav
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.models.layers.told import StreamTables
from nexus_scale.models.tokens.masked_conformer import MaskedConformer
from nexus_scale.models.tokens.prefix_lm import PrefixLM
from nexus_scale.objectives.masked import Masked
from nexus_scale.objectives.soundstorm import Soundstorm
from nexus_scale.objectives.token_scores import score_codes
from nexus_scale.rehearsal.batches import check_together
from nexus_scale.samplers.masked import Masked as Sampler
from nexus_scale.train import make_objective, open_data
from tests.generate.test_prompts import trained_on_made_up_data
from tests.golden import maskgct

K, V, S, END = 3, 16, 8, 3
SIZES: dict[str, Any] = {"num_codebooks": K, "codebook_size": V, "num_semantic": S, "prompt_frames": 4, "repeats": 2}


@pytest.mark.parametrize("case", maskgct.CASES)
def test_what_is_hidden_shown_and_asked_for_is_maskgcts(case: int) -> None:
    """Amphion's MaskGCT_S2A on its own masks and prompts: shares, logits of what is shown, the loss and its gradient; padding among it."""
    with np.load(maskgct.FILE) as file:
        theirs = {name: torch.from_numpy(file[name]) for name in file.files}
        of = {name.split("/")[1]: value for name, value in theirs.items() if name.startswith(f"{case}/")}
    goal = Masked(num_codebooks=maskgct.K, codebook_size=maskgct.V)
    torch.testing.assert_close(goal.schedule.share(of["t"]), of["share"])
    level, real, codes = int(of["layer"]), theirs["real"], theirs["x0"]
    prompt = torch.arange(maskgct.T) < of["prompt"][:, None]
    asked = of["mask"].bool()
    assert not bool((asked & (prompt | ~real)).any()) and bool(asked.any(1).all())
    shown = goal.hidden(codes, asked, prompt, level)

    hides = theirs["mask_emb"].clone().requires_grad_()
    embed = StreamTables(maskgct.K, maskgct.V, maskgct.D)
    del embed.table.rows
    embed.table.rows = torch.cat([theirs["token_emb"], hides[None].expand(maskgct.K, -1, -1)], dim=1).flatten(0, 1)
    frames = embed(shown.codes) + theirs["cond"] + theirs["layer_emb"][level]
    logits = frames @ theirs["head"][level].T + theirs["bias"][level]
    torch.testing.assert_close(logits[real], of["logits"][real], rtol=1e-5, atol=1e-5)
    # theirs is the mean over all hidden codes; ours that over samples of a sample's
    loss = score_codes(logits.flatten(0, 1)[None], codes[..., level].flatten()[None], shown.asked.flatten()[None]).loss
    torch.testing.assert_close(loss[0], of["loss"], rtol=1e-5, atol=1e-5)
    [slope] = torch.autograd.grad(loss[0], [hides])
    torch.testing.assert_close(slope, of["slope"], rtol=1e-5, atol=1e-5)


class Speaker:
    """Knows that a frame's code of level k is twice its semantic token plus k."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, codes: Tensor, level: int, cond: Any) -> Tensor:
        semantic = cond["semantic"].repeat_interleave(2, 1)
        semantic = F.pad(semantic, (0, max(0, codes.shape[1] - semantic.shape[1])))[:, : codes.shape[1]]
        self.asked.append((codes.clone(), cond["prompt"], semantic))
        return 50.0 * F.one_hot((2 * semantic + level) % V, V).float()


class Reader:
    """Reads each phoneme from END on as the token of its number, less END, and then ends."""

    def prefill(self, tokens: Tensor, cond: Any, capacity: int) -> tuple[Tensor, Any]:
        said = torch.where(cond["phonemes_mask"], cond["phonemes"] - END, S)
        memory = {"said": F.pad(said, (0, capacity + 1), value=S), "place": tokens.shape[1] - 1}
        return self._next(memory), memory

    def extend(self, tokens: Tensor, memory: Any) -> Tensor:
        memory["place"] += 1
        return self._next(memory)

    @staticmethod
    def _next(memory: Any) -> Tensor:
        return 50.0 * F.one_hot(memory["said"][:, memory["place"]], S + 1).float()[:, None]


def a_sentence(count: int = 2) -> tuple[dict[str, Tensor], Request]:
    """Two sentences of 4 and 2 phonemes, in voices of 5 and 3 frames, and what is given."""
    sentence = torch.tensor([[3, 5, 9, 4], [10, 6, 0, 0]])[:count]
    semantic = torch.tensor([[7, 6, 5], [1, 2, 0]])[:count]
    frames = torch.arange(5) < torch.tensor([[5], [3]])[:count]
    codes = torch.where(frames[..., None], 2 * semantic.repeat_interleave(2, 1)[:, :5, None] + torch.arange(K), 0) % V
    given = {
        "codes": codes,
        "codes_mask": frames,
        "semantic": semantic,
        "semantic_mask": torch.arange(3) < torch.tensor([[3], [2]])[:count],
    }
    sampler = Sampler(steps=3, choice_temperature=0.0)
    return {"sentence": sentence, "sentence_mask": sentence > 0}, Request(sampler=sampler, given=given)


def test_a_sentence_is_read_and_spoken_in_its_voice() -> None:
    """Its tokens after the voice's, its codes alone come back; a voice is cut to whole tokens; each row is as it is without the other."""
    goal, speaker = Soundstorm(**SIZES, reader={"temperature": 0, "max_tokens": 9}), Speaker()
    nets: Any = {"model": speaker, "reader": Reader()}
    cond, request = a_sentence()
    made = goal.generate(nets, cond, request, ProgressRng(0, 0, "main", torch.arange(2)))
    assert made.lengths is not None and made.lengths.tolist() == [8, 4] and made.ended is not None
    assert made.ended.tolist() == [True, True] and len(speaker.asked) == 3 + K - 1
    for row, tokens in enumerate(([0, 2, 6, 1], [7, 3])):
        wanted = (2 * torch.tensor(tokens).repeat_interleave(2)[:, None] + torch.arange(K)) % V
        assert torch.equal(made.samples[row, : len(wanted)], wanted) and not made.samples[row, len(wanted) :].any()
    codes, prompt, semantic = speaker.asked[0]
    assert prompt.sum(1).tolist() == [4, 2]  # of 5 and 3 frames, two to a token, at most 4
    assert torch.equal(codes[prompt], torch.cat([request.given["codes"][0, :4], request.given["codes"][1, :2]]))
    assert semantic[0, :12].tolist() == [7, 7, 6, 6, 0, 0, 2, 2, 6, 6, 1, 1] and semantic[1, :6].tolist() == [
        1,
        1,
        7,
        7,
        3,
        3,
    ]
    alone = goal.generate(nets, *a_sentence(1), ProgressRng(0, 0, "main", torch.arange(1)))
    assert torch.equal(alone.samples[0], made.samples[0, :8])


def test_a_dialogue_goes_on_from_what_its_voices_said() -> None:
    """The reader is shown their text and tokens, of each row as many as it has; what it adds alone is spoken."""
    goal, speaker = Soundstorm(**SIZES, reader={"temperature": 0, "max_tokens": 12}, reads_on=True), Speaker()
    cond, request = a_sentence()
    said, there = request.given["semantic"] + END, request.given["semantic_mask"]
    rows = [torch.cat([said[k][there[k]], cond["sentence"][k][cond["sentence_mask"][k]]]) for k in range(2)]
    phonemes = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cond |= {"phonemes": phonemes, "phonemes_mask": phonemes > 0}
    nets: Any = {"model": speaker, "reader": Reader()}
    made = goal.generate(nets, cond, request, ProgressRng(0, 0, "main", torch.arange(2)))
    alone = Soundstorm(**SIZES, reader={"temperature": 0, "max_tokens": 12})
    wanted = alone.generate(nets, cond, request, ProgressRng(0, 0, "main", torch.arange(2)))
    assert (
        made.lengths is not None
        and wanted.lengths is not None
        and made.lengths.tolist() == wanted.lengths.tolist() == [8, 4]
    )
    assert torch.equal(made.samples[:, :8], wanted.samples[:, :8])


def test_without_a_reader_semantic_tokens_are_spoken() -> None:
    goal = Soundstorm(**SIZES)
    assert goal.needs == ("model",) and goal.draws.given and "voice" not in goal.draws.takes
    cond, request = a_sentence()
    with pytest.raises(UserError, match="no reader"):
        goal.generate({"model": Speaker()}, cond, request, ProgressRng(0, 0, "main", torch.arange(2)))  # type: ignore[dict-item]
    for changed, words in (
        ({"reader": {"top_p": 2.0}}, "top_p"),
        ({"reader": {"speed": 1}}, "objective.reader"),
        ({"prompt_frames": 1}, "at least repeats"),
    ):
        with pytest.raises(UserError, match=words):
            Soundstorm(**{**SIZES, **changed})


def test_semantic_tokens_at_another_rate_are_refused_before_a_start() -> None:
    """Two frames to a token, rounded up, and once more of pairs; what fills a batch may have been cut; networks are told the same."""
    recipe, goal = load_recipe("soundstorm/tiny_speech"), Soundstorm(**{**SIZES, "repeats": 2})

    class Data:
        samples = 2

        def __init__(self, frames: list[int], tokens: list[int]):
            self.rows = {"codes": frames, "semantic": tokens}

        def fixed(self, count: int, *, batch: int) -> Any:
            masks = {
                f"{k}_mask": torch.arange(20 if k == "codes" else 12) < torch.tensor(v)[:, None]
                for k, v in self.rows.items()
            }
            yield Batch(masks, torch.arange(2), torch.arange(2))

    for frames, tokens in (([9, 15], [5, 8]), ([9, 15], [6, 9]), ([20, 4], [12, 2])):
        check_together(recipe, goal, Data(frames, tokens))
    for frames, tokens in (([9, 15], [9, 12]), ([9, 15], [5, 4])):
        with pytest.raises(
            UserError, match=r"semantic tokens; with objective.repeats 2 expected [58]: set repeats"
        ) as refused:
            check_together(recipe, goal, Data(frames, tokens))
        assert refused.value.code == 3
    other = load_recipe("soundstorm/tiny_speech", {"networks": {"model": {"repeats": {"semantic": 1}}}}, tiny=True)
    with pytest.raises(UserError, match=r"objective.repeats is 2, and networks.model.repeats.semantic 1"):
        check_together(other, make_objective(other, None), open_data(other, Path()))


def test_hidden_codes_begin_as_zeros() -> None:
    """What is told is all that a frame without known codes shows at first."""
    net = MaskedConformer(num_codebooks=K, codebook_size=V, told={"semantic": S}, hidden_size=8, depth=1, num_heads=2)
    net.init_weights()
    rows = net.embed(torch.full((1, 1, K), V))
    assert not rows.any() and bool(net.embed(torch.zeros(1, 1, K, dtype=torch.int64)).any())


def test_a_prefix_lm_reads_phonemes_at_their_pace() -> None:
    """Step by step as at once; who is told no phonemes is what it was; padding of the text changes nothing."""
    torch.manual_seed(0)
    net = PrefixLM(
        codebook_size=S, ends=True, num_phonemes=12, pace=1.5, hidden_size=16, depth=2, num_heads=2, dropout=0.0
    )
    net.init_weights()
    net.eval()
    tokens, phonemes = torch.randint(0, S, (2, 5, 1)), torch.randint(1, 12, (2, 4))
    real = torch.arange(4) < torch.tensor([[4], [3]])
    cond = {"phonemes": phonemes, "phonemes_mask": real}
    whole = net(tokens, cond)
    first, memory = net.prefill(tokens[:, :2], cond, 3)
    steps = [first, *(net.extend(tokens[:, k], memory) for k in range(2, 5))]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 1:])
    torch.testing.assert_close(net(tokens[1:], {"phonemes": phonemes[1:, :3]}), whole[1:])
    slower = PrefixLM(codebook_size=S, ends=True, num_phonemes=12, hidden_size=16, depth=2, num_heads=2, dropout=0.0)
    slower.load_state_dict(net.state_dict())
    assert not torch.allclose(slower.eval()(tokens, cond), whole)
    assert net.told.tokens(7) == 7 and net.told.example(2, 3, "meta")["phonemes"].shape == (2, 3)
    with pytest.raises(UserError, match="num_phonemes"):
        PrefixLM(num_phonemes=1, pace=0)


def test_a_run_speaks_from_the_command_line(tmp_path: Path) -> None:
    """In the voices of its data and of a recording; more steps say the same sentence otherwise; a run without a reader says why not."""
    place = trained_on_made_up_data(tmp_path, "soundstorm/tiny_speech")
    said = evaluate.draw_prompts(place, ["hello there"], speaker="0", output=tmp_path / "said")
    first = (said / "000_hello-there.wav").read_bytes()
    assert len(first) > 44
    more = evaluate.draw_prompts(place, ["hello there"], speaker="0", steps=4, output=tmp_path / "more")
    assert len((more / "000_hello-there.wav").read_bytes()) == len(first)
    clip = tmp_path / "voice.wav"
    clip.write_bytes(encode_wav(0.5 * np.sin(np.arange(4000) / 9)[None].astype(np.float32), 8000))
    evaluate.draw_prompts(place, ["hello"], voice=clip, voice_text="who", output=tmp_path / "clip")
    assert (tmp_path / "clip/000_hello.wav").is_file()
