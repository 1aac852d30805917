"""Utterances after others of their speaker: who follows whom, that codes and phonemes stay joined, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines import load_job
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.interop.phonemes import TABLE

SPACE = TABLE.index(" ")
SPEAKERS = [0, 0, 0, 1, 1, 2, 0, 1, 1, 1]
"""Of ten utterances in shards of six and four: speaker 2 speaks once, speaker 0 once in the second shard."""
NEW = {
    "codes": Field("codes", "codes.npy", "int16", (None, 2)),
    "phonemes": Field("phonemes", "phonemes.npy", "int16", (None,)),
}


def write(root: Path, name: str, shards: Sequence[range] = (range(6), range(6, 10))) -> None:
    """Of utterance n: 5 + n frames of code n, and phonemes begin, 10 + n, end."""
    extra = [Field("label", "cls", "int64", ())] if name == "codes" else [Field("caption", "txt", "text")]
    for place, numbers in enumerate(shards):
        with ShardWriter(root / name / f"{place:05d}.tar", [NEW[name], *extra]) as writer:
            for n in numbers:
                values: dict[str, Any] = {"codes": np.full((5 + n, 2), n, np.int16), "label": SPEAKERS[n]}
                if name == "phonemes":
                    values = {"phonemes": np.array([1, 10 + n, 2], np.int16), "caption": f"line {n}"}
                writer.write(f"{n:03d}", values)
    finish_folder(root / name, encoder={"kind": name, "fingerprint": f"of {name}"})


def pair(root: Path, name: str, **options: Any) -> Manifest:
    made = load_job("pair_utterances").run(
        input=name, output=f"paired/{name}", speakers="codes", workers=0, data_root=root, runs_root=root, **options
    )
    assert isinstance(made, Manifest)
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "codes")
    write(tmp_path, "phonemes")
    return tmp_path


def test_codes_and_phonemes_are_paired_alike(root: Path) -> None:
    """Each utterance comes last in its pairs, after another of its speaker and shard; both folders join, and know their encoders."""
    pair(root, "codes", bounds=[16, 32], turns=2)
    pair(root, "phonemes", turns=2)
    paired = Dataset.open([Source([root / "paired/codes", root / "paired/phonemes"])], tokens={"phonemes": 8})
    paired.check_encoders({"codes": "of codes", "phonemes": "of phonemes"})
    assert paired.buckets == ("codes<=16", "codes<=32") and paired.samples == 20
    seen: dict[int, list[int]] = {}
    for batch in paired.fixed(20):
        captions = paired.texts("caption", batch.samples.tolist())
        for row, (key, caption) in enumerate(zip(paired.keys(batch.samples.tolist()), captions, strict=True)):
            then = int(key[:3])
            codes = batch["codes"][row, :, 0][batch["codes_mask"][row]].tolist()
            first = codes[0]
            alone = first == then
            assert codes == ([] if alone else [first] * (5 + first)) + [then] * (5 + then)
            phonemes = batch["phonemes"][row][batch["phonemes_mask"][row]].tolist()
            assert phonemes == [1, *([] if alone else [10 + first, SPACE]), 10 + then, 2]
            assert caption == (f"line {then}" if alone else f"line {first} / line {then}")
            assert int(batch["label"][row]) == SPEAKERS[first] == SPEAKERS[then] and (first < 6) == (then < 6)
            assert (len(codes) <= 16) == (batch.bucket == "codes<=16")
            seen.setdefault(then, []).append(first)
    assert seen[5] == [5, 5] and seen[6] == [6, 6], "who has no other of the speaker in the shard stays alone"
    assert sorted(seen[0]) == [1, 2] and sorted(seen[1]) == [0, 2] and all(len(seen[n]) == 2 for n in range(10))


def test_a_rerun_redoes_nothing_and_other_speakers_all(root: Path) -> None:
    job = load_job("pair_utterances")
    options = {
        "input": "phonemes",
        "output": "paired/phonemes",
        "speakers": "codes",
        "data_root": root,
        "runs_root": root,
    }
    assert not job.done(**options)
    pair(root, "phonemes")
    written = {path: path.stat().st_mtime_ns for path in sorted((root / "paired/phonemes").glob("*.tar"))}
    assert job.done(**options)
    pair(root, "phonemes")
    assert written == {path: path.stat().st_mtime_ns for path in written}
    SPEAKERS[0] = 1
    try:
        write(root, "codes")
    finally:
        SPEAKERS[0] = 0
    assert not job.done(**options)


def test_what_cannot_be_paired_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="has no `label`"):
        load_job("pair_utterances").run(
            input="codes", output="paired/codes", speakers="phonemes", workers=0, data_root=root, runs_root=root
        )
    with pytest.raises(UserError, match="largest bound is 12"):
        pair(root, "codes", bounds=[12])
    with pytest.raises(UserError, match=r"turns: input should be .* 1; got 0"):
        pair(root, "codes", turns=0)
    write(root / "fewer", "codes", (range(3), range(6, 9)))
    with pytest.raises(UserError, match="no such sample among the speakers"):
        load_job("pair_utterances").run(
            input="phonemes", output="p", speakers="fewer/codes", workers=0, data_root=root, runs_root=root
        )
