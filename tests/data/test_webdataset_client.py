"""Our shards are WebDataset's: its package reads ours, and we read what its writer made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, decode, read_samples

pytest.importorskip("webdataset")

CLIENT = """
import json, sys
import numpy as np
import webdataset as wds

assert not any(name.split(".")[0] == "nexus_scale" for name in sys.modules)
rows = []
for sample in wds.WebDataset(sys.argv[1], shardshuffle=False).decode("pil"):
    rows.append({
        "key": sample["__key__"], "moments": float(np.asarray(sample["moments.npy"], np.float64).sum()),
        "shape": list(sample["moments.npy"].shape), "dtype": str(sample["moments.npy"].dtype), "caption": sample["txt"],
        "meta": sample["json"], "label": sample["cls"], "pixel": list(sample["png"].getpixel((1, 0))), "size": sample["png"].size,
    })
print(json.dumps(rows))
"""

WRITER = """
import sys
import numpy as np
import webdataset as wds

with open(sys.argv[1], "wb") as file, wds.TarWriter(file) as tar:
    for i in range(4):
        tar.write({"__key__": f"dir/sample{i}", "txt": f"text {i}", "cls": i, "json": {"n": i},
                   "emb.npy": np.full((2, i + 1), i, np.float16), "png": np.full((3, 5, 3), i / 4, np.float32)})
"""


def run(script: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_webdataset_package_reads_our_shards(tmp_path: Path) -> None:
    fields = [
        Field("moments", "moments.npy", "float16", (4, 2, 2)),
        Field("image", "png", "uint8", (3, 5, 3)),
        Field("caption", "txt", "text"),
        Field("meta", "json", "json"),
        Field("label", "cls", "int64", ()),
    ]
    with ShardWriter(tmp_path / "00000.tar", fields) as writer:
        for i in range(3):
            pixels = np.zeros((3, 5, 3), np.uint8)
            pixels[0, 1] = (i, 2, 3)
            value = np.full((4, 2, 2), i, np.float16)
            writer.write(f"{i:06d}", {"moments": value, "image": pixels, "caption": "ä", "meta": {"i": i}, "label": i})
    rows = json.loads(run(CLIENT, tmp_path / "00000.tar"))
    assert rows == [
        {
            "key": f"{i:06d}", "moments": 16.0 * i, "shape": [4, 2, 2], "dtype": "float16", "caption": "ä",
            "meta": {"i": i}, "label": i, "pixel": [i, 2, 3], "size": [5, 3],
        }
        for i in range(3)
    ]  # fmt: skip


def test_we_read_what_its_writer_made(tmp_path: Path) -> None:
    run(WRITER, tmp_path / "x.tar")
    samples = list(read_samples(tmp_path / "x.tar"))
    assert [sample.key for sample in samples] == [f"dir/sample{i}" for i in range(4)]
    for i, (_, members) in enumerate(samples):
        got = {name: decode(name, data) for name, data in members.items()}
        assert (got["txt"], got["cls"], got["json"]) == (f"text {i}", i, {"n": i})
        assert np.array_equal(got["emb.npy"], np.full((2, i + 1), i, np.float16)) and got["png"].shape == (3, 5, 3)
