"""Silence is broken, speech is not disturbed, and the streams come back as they were."""

from __future__ import annotations

import logging
import re
import sys

import pytest

from nexus_scale.io.ticker import Ticker, paced, still, ticking
from tests.distributed import until


def test_silence_is_broken_with_the_last_line_and_ever_more_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    ticker = Ticker(0.05, 0.2, said.append)
    ticker.hear("drawing 252 samples\n\n")
    ticker.start()
    until(lambda: len(said) >= 3)
    ticker.stop()
    assert all(re.fullmatch(r"\.\.\. \d+ s: drawing 252 samples", line) for line in said)
    count = len(said)
    assert not ticker.is_alive() and len(said) == count, "stopped, it says nothing more"


def test_a_long_call_is_told_by_what_it_does() -> None:
    said: list[str] = []
    with still("compiling", said.append, every_s=0.05):
        until(lambda: bool(said))
    assert said[0] == "... 0 s: compiling"


def test_lines_of_a_loop_are_thinned() -> None:
    all_said: list[str] = []
    none_said: list[str] = []
    every, rarely = paced(all_said.append, 0.0), paced(none_said.append, 3600.0)
    for line in ("step 1", "step 2"):
        every(line)
        rarely(line)
    assert all_said == ["step 1", "step 2"] and not none_said


def test_a_program_that_speaks_is_not_interrupted() -> None:
    said: list[str] = []
    ticker = Ticker(30.0, 60.0, said.append)
    ticker.start()
    ticker.stop()
    assert not said


def test_streams_pass_through_and_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = sys.stdout, sys.stderr
    with ticking(0.05):
        print("step 10/20, loss 0.5")
        assert sys.stdout.isatty() is out.isatty(), "all else is the stream's own"
        heard = []

        def silent() -> bool:
            heard.append(capsys.readouterr())
            return any("... 0 s: step 10/20, loss 0.5" in one.err for one in heard)

        until(silent)
    assert sys.stdout is out and sys.stderr is err
    assert "".join(one.out for one in heard) == "step 10/20, loss 0.5\n", "stdout is the program's alone"


def test_what_logging_says_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    with ticking(0.05):
        handler = logging.StreamHandler(sys.stderr)
        log = logging.getLogger("a test of the ticker")
        log.addHandler(handler)
        try:
            log.warning("the judge learns")
            until(lambda: "s: the judge learns" in capsys.readouterr().err)
        finally:
            log.removeHandler(handler)
