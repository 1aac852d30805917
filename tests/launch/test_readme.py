"""The README's Python, run as it stands: only the data are made up, and the steps few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parents[2] / "README.md"


def test_its_python_trains_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    call = '"mmdit/tiny_openmoji", [], cluster="local_cpu"'
    assert call in code
    code = code.replace(call, call.replace("[]", '["cluster.workers=0"]') + ", tiny=True")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXUS_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setenv("NEXUS_RUNS_ROOT", str(tmp_path / "runs"))
    exec(compile(code, "README.md", "exec"), {})
    drawn = [Image.open(tmp_path / f"{i}.png") for i in (0, 1)]
    assert all(image.mode == "RGB" for image in drawn)
