"""`certificate.html`: the certificate for people, one file without script or network, in the style of the run's report."""

from __future__ import annotations

import math
from html import escape

from nexus_scale.callbacks.metrics import duration
from nexus_scale.certify.certificate import Certificate
from nexus_scale.certify.kills import WORDS
from nexus_scale.report.charts import Line, chart, table
from nexus_scale.report.page import framed


def page(certificate: Certificate) -> str:
    parts = [_head(certificate), _figures(certificate), _promises(certificate), _legs(certificate), _deviation(certificate),
             _controls(certificate), _kills(certificate), _versions(certificate)]  # fmt: skip
    footer = "<footer>The same as one object: certificate.json. Digests of every step: digests/ in each leg's run folder.</footer>"
    return framed(f"Certificate of {certificate.recipe}", "\n".join(filter(None, [*parts, footer])))


def _section(title: str, words: str, body: str) -> str:
    return f"<h2>{escape(title)}<small>{escape(words)}</small></h2>{body}"


def _head(certificate: Certificate) -> str:
    verdict = "Nothing was lost." if certificate.passed else "Failed: " + "; ".join(certificate.failures) + "."
    return (
        f'<header><p class="kind">resume certificate</p><h1>{escape(certificate.recipe)}</h1>'
        f'<p class="summary">{escape(verdict)}</p></header>'
    )


def _figures(certificate: Certificate) -> str:
    recovery = certificate.recovery_seconds
    deviation = certificate.largest_deviation
    cells = [
        ("passed" if certificate.passed else "failed", "verdict"),
        ("equal" if certificate.equal_bits else "different", "bits of the twin"),
        (certificate.kills, f"kills, {certificate.kills_inside_a_save} inside a save"),
        (certificate.lost_steps, f"steps lost at most; a checkpoint every {certificate.checkpoint_every}"),
        ("n/a" if recovery is None else f"{recovery['median']:.1f} s", "median recovery"),
        ("n/a" if deviation is None else f"{deviation:.1e}", "loss, rescaled, relative"),
        (duration(certificate.seconds), "time in all"),
    ]
    inside = "".join(f"<div><b>{escape(str(value))}</b><span>{escape(words)}</span></div>" for value, words in cells)
    return f'<div class="figures">{inside}</div>'


def _promises(certificate: Certificate) -> str:
    recovery, deviation = certificate.recovery_seconds, certificate.largest_deviation
    rows = [
        ("Bits of every step and of the last checkpoint", "equal", "equal" if certificate.equal_bits else "different"),
        ("Samples, by their place in the global batch", "the same", "the same" if certificate.same_samples else "others"),
        ("Loss on other numbers of workers, relative", "at most 1e-6", "n/a" if deviation is None else f"{deviation:.1e}"),
        ("Steps lost after one kill", f"at most {certificate.checkpoint_every}, and what was trained while a torn save was written",
         f"{certificate.lost_steps}, of them {certificate.lost_behind_a_save} behind a save"),
        ("Steps lost after SIGTERM", "0", str(certificate.lost_to_preemption)),
        ("Recovery, worst", "", "n/a" if recovery is None else f"{recovery['worst']:.1f} s"),
    ]  # fmt: skip
    return _section("Promises", "", table(("", "promised", "found"), rows))


def _legs(certificate: Certificate) -> str:
    rows = [
        (leg.name, " → ".join(map(str, leg.workers)), leg.steps_compared, leg.differing, duration(leg.seconds))
        for leg in certificate.legs
    ]
    wrong = [f"{leg.name}: {words}" for leg in certificate.legs for words in leg.wrong]
    listed = f"<details open><summary>The first differences</summary>{table(('',), [[w] for w in wrong])}</details>"
    words = f"{certificate.steps} steps each, {certificate.steps_redone} of the twin's digests of steps done again"
    return _section(
        "Legs", words, table(("", "workers", "steps compared", "differences", "time"), rows) + (listed if wrong else "")
    )


def _deviation(certificate: Certificate) -> str:
    points = [(step, value) for step, value in certificate.deviations if math.isfinite(value)]
    if not points:
        return ""
    line = Line("relative deviation", [step for step, _ in points], [value for _, value in points])
    return _section(
        "Loss of the rescaled leg", "against the reference, by step", chart("deviation", [line], from_zero=True)
    )


def _controls(certificate: Certificate) -> str:
    if not certificate.controls:
        return ""
    rows = [(item, "found" if found else "unnoticed") for item, found in certificate.controls.items()]
    return _section("Controls", "a resume without it must be found", table(("left out", ""), rows))


def _kills(certificate: Certificate) -> str:
    kinds = [(WORDS.get(kind, kind), count) for kind, count in certificate.kills_by_kind.items()]  # type: ignore[call-overload]
    rows = [
        (kill["kind"], kill["where"], "yes" if kill["struck"] else "not reached") for kill in certificate.kill_table
    ]
    every = f"<details><summary>Every kill</summary>{table(('kind', 'where', 'struck'), rows)}</details>"
    words = f"{certificate.kills} of {certificate.kills_planned} struck, seed {certificate.seed}"
    return _section("Kills", words, table(("", "struck"), kinds) + every)


def _versions(certificate: Certificate) -> str:
    found = certificate.versions
    rows = [*found.get("versions", {}).items(), ("commit", found.get("commit", ""))]
    return _section("What ran", "", table(("", ""), rows))
