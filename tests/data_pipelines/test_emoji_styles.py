"""Emoji in two styles: one key in both, the same held out of both, and nothing that has no twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import fetch_emoji_styles, ingest_images, rasterise_openmoji
from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.shards import read_samples


def package(folder: Path) -> None:
    for name in ("data", "color/svg", "black/svg"):
        (folder / name).mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": rasterise_openmoji.VERSION}))
    (folder / "LICENSE.txt").write_text("the licence")
    rows = [(f"B{number}", "objects", "") for number in range(12)]
    rows += [("A1", "flags", ""), ("B1-2", "people-body", "B1"), ("C1", "extras-openmoji", ""), ("D1", "objects", "")]
    catalogue = []
    for code, group, base in rows:
        catalogue.append({"hexcode": code, "group": group, "annotation": f"the {code}", "skintone_base_hexcode": base})
        for style, fill in (("color", "red"), ("black", "none")):
            svg = f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><rect width="36" height="72" fill="{fill}"/></svg>'
            (folder / style / "svg" / f"{code}.svg").write_text(svg)
    (folder / "black/svg/D1.svg").unlink()
    (folder / "data/openmoji.json").write_text(json.dumps(catalogue))


def test_both_styles_of_an_emoji_have_one_key(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    package(tmp_path / "package")
    roots = {"data_root": tmp_path, "runs_root": tmp_path}
    given = {"package": "package", "size": 16, "output": "styles", **roots}
    fetch_emoji_styles.run(**given)
    assert fetch_emoji_styles.done(**given) and not fetch_emoji_styles.done(**{**given, "size": 24})
    for style in ("black", "color"):
        samples = list(read_samples(tmp_path / f"styles/{style}.tar"))
        assert [one.key for one in samples] == [f"B{number}" for number in range(12)]
        assert samples[3].members["txt"] == b"the B3"
        ingest_images.run(source=f"styles/{style}.tar", output=style, heldout=0.3, **roots)
    assert "the licence" in (tmp_path / "styles/LICENSE.txt").read_text()
    for split in ("train", "heldout"):
        folders = [tmp_path / style / split / "images" for style in ("color", "black")]
        data = Dataset.open([Source(folders[:1], named={"source": folders[1]})])
        batch = next(iter(data.fixed(1)))
        assert (batch["image"][0, :, 8, 2] * 127.5).round().tolist() != (
            batch["source"][0, :, 8, 2] * 127.5
        ).round().tolist()
    with pytest.raises(UserError, match=r"nowhere.tgz: no such file.*npm pack openmoji@17"):
        fetch_emoji_styles.run(package="nowhere.tgz", output="c", **roots)
