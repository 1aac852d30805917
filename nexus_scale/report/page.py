"""`report.html` of a run: one file that needs no network and no script; and `results.json` with the same figures.

Shows whatever the run folder has. Everything that comes from data or recipes is escaped; the page's own policy forbids scripts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from nexus_scale.contracts import RunFolder
from nexus_scale.io.durable import atomic_write
from nexus_scale.report.contents import read_contents, results_of
from nexus_scale.report.sections import embedded, sections

FOOT = "<footer>Figures of this page: results.json. All rows: metrics.jsonl and validation.jsonl in the run folder.</footer>"


@cache
def style() -> str:
    """The style sheet of all pages."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def framed(title: str, body: str) -> str:
    """A page that needs nothing else, with the report's style and policy; `body` is HTML."""
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), style=style(), body=body)


def write_report(run: RunFolder, *, given: Mapping[str, Any] | None = None) -> Path:
    """Writes a run's `report.html` and `results.json` from its folder, each atomically.

    Args:
        given: figures that the folder does not know, or knows less well: `wall_seconds`, `peak_memory_bytes`, `workers`, or new ones.
    Returns:
        where the report lies.
    """
    contents = read_contents(run)
    results = results_of(contents, given or {})
    parts = [*sections(contents, results, embedded).values(), FOOT]
    page = framed(contents.name, "\n".join(part for part in parts if part))
    atomic_write(run.report, page.encode())
    atomic_write(run.results, json.dumps(results, indent=1).encode() + b"\n")
    return run.report
