"""Human studies: what is made of samples, who is shown what, what is kept, and what follows from it."""

from __future__ import annotations

import json
import math
import random
import sqlite3
import struct
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import decode_wav
from nexus_scale.metrics.loudness import loudness_lufs
from nexus_scale.study.answers import Answers
from nexus_scale.study.folder import Study
from nexus_scale.study.media import LOUDNESS_LUFS
from nexus_scale.study.new import System, Wanted, new_study, systems_of
from nexus_scale.study.report import page, report_of, scores_of, text, write_report
from tests.study.studies import clips, pictures, sounds, study_of, take_part


def test_samples_are_blinded(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 3, 200), pictures(tmp_path / "b", 4, 90, "jpg")
    study = new_study([System("a", a), System("b", b)], tmp_path / "study", Wanted())
    files = sorted((study.folder / "media").iterdir())
    assert len(files) == 3 * 2 + 3 * 2 and {file.suffix for file in files} == {".png"}
    assert len({file.stat().st_mtime for file in files}) == 1
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG" and not image.info
        assert "thing" not in file.name and file.stem != "a"
    assert [group.prompt for group in study.samples.groups] == [f"thing <b>{i}</b>" for i in range(3)]
    assert [question.name for question in study.settings.questions] == ["preference", "following"]
    with (
        Image.open(study.file(study.samples.groups[0].media[0].parts[0])) as shown,
        Image.open(a / "000_thing.png") as given,
    ):
        assert np.array_equal(np.asarray(shown), np.asarray(given))
    for check in study.samples.checks:  # a copy that anyone sees to be spoilt
        good, bad = (np.asarray(Image.open(study.file(one.parts[0])), np.float32) for one in (check.good, check.bad))
        assert np.abs(good - bad).mean() > 20
    again = Study(study.folder)
    assert again.fingerprint == study.fingerprint and len(again.pairs) == 3


def test_clips_become_sheets_of_their_frames(tmp_path: Path) -> None:
    study = study_of(tmp_path, "clip", count=1, checks=())
    medium = study.samples.groups[0].media[0]
    assert (
        study.settings.kind == "clip"
        and medium.frames == 6
        and medium.size == (32, 24)
        and medium.rate_hz == pytest.approx(10)
    )
    with Image.open(study.file(medium.parts[0])) as image:
        sheet = np.asarray(image.convert("RGB"))
    for frame in range(6):
        row, column = divmod(frame, medium.columns)
        assert (sheet[row * 24, column * 32 : column * 32 + 32, 0] == 40 * frame).all()


def test_sounds_of_a_prompt_are_equally_loud(tmp_path: Path) -> None:
    """Those of 16 and 8 kHz, loud and soft, become 48 kHz at one loudness; and the study states it."""
    loud, soft = sounds(tmp_path / "loud", 2, 0.9), sounds(tmp_path / "soft", 2, 0.01, 8_000)
    as_floats = (
        b"RIFF\0\0\0\0WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 3, 1, 16_000, 64_000, 4, 32)
        + b"data"
        + struct.pack("<I", 64_000)
    )
    tone = 0.9 * np.sin(2 * np.pi * 300 * np.arange(16_000) / 16_000)
    (loud / "000.wav").write_bytes(as_floats + tone.astype("<f4").tobytes())  # decoded in a process of its own
    study = new_study(
        [System("loud", loud), System("soft", soft)], tmp_path / "study", Wanted(questions=["preference"])
    )
    assert study.settings.loudness is not None and "BS.1770" in study.settings.loudness
    for group in study.samples.groups:
        heard = [decode_wav(study.file(one.parts[0]).read_bytes()) for one in group.media]
        assert {one.sample_rate_hz for one in heard} == {48_000} and len({one.wave.shape for one in heard}) == 1
        assert [loudness_lufs(one.wave, 48_000) for one in heard] == pytest.approx([LOUDNESS_LUFS] * 2, abs=0.05)
        assert group.media[0].gain_db < -15 and group.media[1].gain_db > 15


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 2, 200), pictures(tmp_path / "b", 2, 90)
    both, c = [System("a", a), System("b", b)], clips(tmp_path / "c", 1, 90)
    (c / "000.webp").rename(c / "000_thing.webp")
    (empty := tmp_path / "empty").mkdir()
    (torn := tmp_path / "torn").mkdir()
    (torn / "000_thing.png").write_bytes((a / "000_thing.png").read_bytes()[:60])
    (twice := tmp_path / "twice").mkdir()
    for suffix in ("png", "jpg"):
        (twice / f"000_thing.{suffix}").write_bytes(b"")
    for words, systems, wanted in (
        ("no sample has the same name", [System("a", a), System("e", empty)], Wanted()),
        ("is of one kind of sample", [System("a", a), System("c", c)], Wanted()),
        ("cannot be read as a picture", [System("a", a), System("t", torn)], Wanted()),
        ("the same name with another suffix", [System("a", a), System("t", twice)], Wanted()),
        ("has 3 for 2 samples", both, Wanted(prompts=["x", "y", "z"])),
        ("expected preference, following", both, Wanted(questions=["beauty"])),
        ("each once", both, Wanted(questions=["preference", "preference"])),
        ("a name of small letters", both, Wanted(questions=["A b=What?"])),
    ):
        with pytest.raises(UserError, match=words):
            new_study(systems, tmp_path / "study", wanted)
        assert not [file for file in tmp_path.iterdir() if "study" in file.name], words  # nothing is left of it
    (a / "000_thing.txt").unlink()
    (b / "000_thing.txt").unlink()
    with pytest.raises(UserError, match="no prompt that it could follow"):
        new_study(both, tmp_path / "study", Wanted(questions=["following"]))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "x").touch()
    with pytest.raises(UserError, match="is there already"):
        new_study(both, tmp_path / "study", Wanted())
    with pytest.raises(UserError, match="two systems or more"):
        systems_of([str(a)], lambda run: pytest.fail("no run"))
    with pytest.raises(UserError, match="name them: NAME=FOLDER"):
        systems_of([str(a), f"{a}/"], lambda run: pytest.fail("no run"))
    assert [one.name for one in systems_of([f"new={a}", str(b)], lambda run: pytest.fail("no run"))] == ["new", "b"]


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, count=1)
    elsewhere = {"systems": ["A", "B"], "groups": [{"name": "x", "media": [{"parts": ["../../etc/x.png"]}]}]}
    for file, content, words in (
        ("study.yaml", "version: 9\n", "version"), ("study.yaml", "a: !!python/name:os.system", "not plain YAML"),
        ("study.yaml", None, "is no study"),
        ("samples.json", "{", "damaged"), ("samples.json", '{"systems": ["x", "y"], "groups": []}', "groups"),
        ("samples.json", None, "again"),
        ("samples.json", json.dumps(elsewhere), "pattern"),
    ):  # fmt: skip
        path = study.folder / file
        before = path.read_bytes()
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match=words):
            Study(study.folder)
        path.write_bytes(before)
    (study.folder / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        Answers(study)


def test_pairs_are_shared_out_evenly_and_at_random(tmp_path: Path) -> None:
    checks = ("degraded", "repeat")
    study = study_of(tmp_path, systems=3, count=4, judgements=4, per_rater=6, every=3, checks=checks, passed=0)
    take_part(study, 8, {"A": 3, "B": 1, "C": 1})
    answers = Answers(study)
    judged = list(answers.judgements())
    pairs = [one for one in judged if one.kind == "pair"]
    assert set(Counter(one.item for one in pairs).values()) == {4} and len(pairs) == 12 * 4  # each as often as wanted
    assert set(Counter(one.rater for one in pairs).values()) == {6}
    assert len({(one.rater, one.item) for one in pairs}) == len(pairs)
    kinds = Counter(one.kind for one in judged)
    assert kinds["degraded"] >= 8 and kinds["repeat"] >= 8
    assert 0.25 < sum(one.swapped for one in pairs) / len(pairs) < 0.75
    turned = {(one.rater, one.item): one.swapped for one in pairs}
    assert all(turned[one.rater, one.item] is not one.swapped for one in judged if one.kind == "repeat")
    rater = answers.rater(answers.join() or "")
    assert answers.next(rater or 0) is None  # no pair is left to judge
    answers.close()


def test_those_who_fail_their_checks_fill_no_quota(tmp_path: Path) -> None:
    """Two careless raters among six: each pair has three judgements that count, and in the report none is missing."""
    study = study_of(tmp_path, count=6, judgements=3, questions=["preference"], every=2)
    take_part(study, 6, {"A": 3, "B": 1}, careless=2)
    found = report_of(study)
    assert [one["rater"] for one in found["excluded"]] == [1, 2] and found["excluded_judgements"] > 0
    assert found["judgements"] == found["wanted"] == 18 and not found["pairs_with_fewer"]


def test_an_answer_is_one(tmp_path: Path) -> None:
    study = study_of(tmp_path, count=2, questions=["preference"], checks=())
    answers = Answers(study)
    one, other = (answers.rater(answers.join() or "") or 0 for _ in range(2))
    shown = answers.next(one)
    assert shown is not None and answers.next(one) == shown  # after a reload
    assert not answers.answer(other, shown.id, {"preference": "left"}, 1)
    assert answers.answer(one, shown.id, {"preference": "left"}, 1) and answers.answer(
        one, shown.id, {"preference": "left"}, 9
    )
    assert not answers.answer(one, shown.id, {"preference": "right"}, 1)
    (kept,) = answers.judgements()
    assert kept.choices == {"preference": "second" if shown.swapped else "first"} and kept.seconds == 1
    assert answers.rater("' OR 1=1 --") is None and answers.rater("\udcff") is None
    (pages,) = answers._db.execute("PRAGMA page_count").fetchone()
    answers._db.execute(f"PRAGMA max_page_count = {pages}")  # as on a full disk
    with pytest.raises(sqlite3.OperationalError, match="full"):
        all(answers.join() for _ in range(1000))
    answers._db.execute("PRAGMA max_page_count = 1000000")
    assert answers.rater(answers.join() or "")  # once there is room again
    assert answers._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert answers._db.execute("PRAGMA synchronous").fetchone() == (2,)
    answers.close()
    (study.folder / "study.yaml").write_text(
        (study.folder / "study.yaml").read_text().replace("ties: true", "ties: false")
    )
    with pytest.raises(UserError, match="other samples or other questions"):
        Answers(Study(study.folder))


TRUTH = {"A": 4.0, "B": 2.0, "C": 1.0}


def test_raters_of_known_preference_are_recovered(tmp_path: Path) -> None:
    study = study_of(tmp_path, systems=3, count=10, judgements=16, questions=["preference"], every=6, seed=3)
    take_part(study, 19, TRUTH, careless=3)
    found = write_report(study)
    (question,) = found["questions"]
    logs = {name: math.log(value) for name, value in TRUTH.items()}
    mean = sum(logs.values()) / 3
    for one in question["scores"]:
        assert (
            one["score"] == pytest.approx(logs[one["system"]] - mean, abs=0.45)
            and one["low"] < one["score"] < one["high"]
        )
    assert [one["system"] for one in question["scores"]] == ["A", "B", "C"]
    assert question["tie_strength"] == pytest.approx(0.5, abs=0.25)
    assert next(one for one in question["differences"] if (one["better"], one["than"]) == ("A", "C"))["low"] > 0
    wins, ties = np.array(question["wins"]), np.array(question["ties"])
    assert (
        wins.sum() + ties.sum() / 2
        == found["judgements"]
        == sum(sum(one["wins"]) + one["ties"] for one in question["prompts"])
    )
    assert 0 < question["agreement"] < 0.6
    assert [one["rater"] for one in found["excluded"]] == [1, 2, 3]  # who took spoilt copies
    assert found["excluded_judgements"] > 0 and 0.4 < found["left_share"] < 0.6
    shown, html = text(found), (study.folder / "report.html").read_text()
    for words in ("A over C", "checks passed", "left out", "won : lost"):
        assert words in shown and words in html
    assert "thing &lt;b&gt;3&lt;/b&gt;" in html and "<b>3</b>" not in html and "<script" not in html
    assert json.loads((study.folder / "report.json").read_text()) == found == report_of(study)


def drawn(rng: np.random.Generator, strength: Sequence[float], raters: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Wins and ties of raters who follow Davidson's model with nu 0.5, `each` judgements of every two systems."""
    wins, ties = np.zeros((2, raters, len(strength), len(strength)))
    for i, j in combinations(range(len(strength)), 2):
        chances = np.array([strength[i], strength[j], 0.5 * math.sqrt(strength[i] * strength[j])])
        seen = rng.multinomial(each, chances / chances.sum(), raters)
        wins[:, i, j], wins[:, j, i] = seen[:, 0], seen[:, 1]
        ties[:, i, j] = ties[:, j, i] = seen[:, 2]
    return wins, ties


def test_known_strengths_lie_within_the_intervals() -> None:
    """In 40 studies of three systems by 16 raters, 95 % intervals hold at least 88 % of the true scores (redraws of few raters are a
    little narrow), and the estimates lie around the truth."""
    rng, logs = np.random.default_rng(0), np.log(list(TRUTH.values()))
    truth = dict(zip(TRUTH, logs - logs.mean(), strict=True))
    held, errors = [], []
    for seed in range(40):
        for one in scores_of(list(TRUTH), *drawn(rng, list(TRUTH.values()), 16, 4), seed)["scores"]:
            held.append(one["low"] < truth[one["system"]] < one["high"])
            errors.append(one["score"] - truth[one["system"]])
    assert sum(held) / len(held) >= 0.88
    assert np.abs(errors).mean() < 0.25


def test_equal_systems_seldom_differ() -> None:
    """Of 40 studies of equal systems at most 6 claim a difference: at 5 % more than that has a chance of 1 in 70."""
    rng = np.random.default_rng(0)
    found = [scores_of(["a", "b"], *drawn(rng, [1, 1], 16, 10), seed)["differences"][0] for seed in range(40)]
    assert sum(one["low"] > 0 for one in found) <= 6


def test_little_says_little(tmp_path: Path) -> None:
    study = study_of(tmp_path, count=2, questions=["preference"], ties=False)
    with pytest.raises(UserError, match="nobody has judged a pair yet"):
        report_of(study)
    take_part(study, 1, {"A": 1e9, "B": 1.0})
    found = report_of(study)
    (question,) = found["questions"]
    assert question["tie_strength"] is None and question["scores"][0]["low"] is None and question["agreement"] is None
    assert "one rater: no interval" in text(found) and "pairs have fewer than wanted" in text(found) and page(found)
    with sqlite3.connect(study.folder / "answers.sqlite") as db:  # a check that failed
        db.execute("INSERT INTO assignments VALUES ('x', 1, 'degraded', 0, 0, 0, 1, 1)")
        db.execute("INSERT INTO answers VALUES ('x', 'preference', 'second')")
        db.execute(
            "DELETE FROM assignments WHERE kind = 'degraded' AND id != 'x' AND id NOT IN (SELECT assignment FROM answers)"
        )
    with pytest.raises(UserError, match="failed the checks"):
        report_of(study)


def test_random_is_random(tmp_path: Path) -> None:
    """No rater is told the order of another: what is drawn first differs."""
    study = study_of(tmp_path, count=8, checks=())
    answers = Answers(study)
    firsts = {(answers.next(answers.rater(answers.join() or "") or 0) or random).item for _ in range(8)}  # type: ignore[union-attr]
    answers.close()
    assert len(firsts) == 8  # the fewest first: each pair once before any twice
