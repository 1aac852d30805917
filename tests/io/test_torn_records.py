"""Whatever a killed job or a hand left of the files beside the shards, the same command makes the data whole again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import cut_segments, ingest_clips, ingest_images
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import RawSample, ShardWriter, finish_folder
from nexus_scale.data.sounds import encode_wav
from nexus_scale.orchestration.data_jobs import MOMENTS, ShardJob, run_job

DAMAGES = (b"", b"{", b"[]", b"null", b"5", b'{"format": 1}', b"\xff\xfe", b"[" * 5000, None)
"""None: cut in half."""


class Moments:
    """An encoder of moments, so that there are sums beside the shards."""

    fingerprint = "moments"
    fields = (Field(MOMENTS, f"{MOMENTS}.npy", "float16", (4, 2, 2)),)

    def __init__(self, device: str):
        pass

    def encode(self, samples: list[RawSample]) -> list[dict[str, Any]]:
        return [{MOMENTS: np.arange(16, dtype=np.float16).reshape(4, 2, 2) * len(one.key)} for one in samples]


def images(root: Path) -> Callable[[], object]:
    (root / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"photos/{number}.png")
        (root / f"photos/{number}.txt").write_text(f"word {number}")
    given: dict[str, Any] = {"output": "out", "source": "photos", "heldout": 0.0, "shard_samples": 2}
    return lambda: ingest_images.run(**given, data_root=root, runs_root=root)


def stills(root: Path) -> Callable[[], object]:
    images(root)
    given: dict[str, Any] = {
        "output": "out",
        "source": "photos",
        "size": "8x8",
        "frames": 1,
        "fps": 1,
        "heldout": 0.0,
        "shard_videos": 2,
    }
    return lambda: ingest_clips.run(**given, workers=0, data_root=root, runs_root=root)


def segments(root: Path) -> Callable[[], object]:
    with ShardWriter(root / "clips/a.tar", [Field("audio", "wav", "int16", (1, None))]) as writer:
        for number in range(3):
            writer.write(str(number), {"audio": encode_wav(np.zeros((1, 300), np.float32), 100)})
    finish_folder(root / "clips")
    given: dict[str, Any] = {"input": "clips", "output": "out", "segment_seconds": 1}
    return lambda: cut_segments.run(**given, workers=0, data_root=root, runs_root=root)


def moments(root: Path) -> Callable[[], object]:
    for shard in ("a", "b"):
        with ShardWriter(root / f"in/{shard}.tar", [Field("caption", "txt", "text")]) as writer:
            writer.write(shard, {"caption": shard})
            writer.write(shard * 3, {"caption": shard})
    finish_folder(root / "in")
    job = ShardJob(root / "in", root / "out", Moments, {"kind": "vae", "fingerprint": "moments"}, {}, 2, "channel")
    return lambda: run_job(job, workers=0)


@pytest.mark.parametrize("make", [images, stills, segments, moments])
def test_torn_files_beside_the_shards_are_made_again(
    tmp_path: Path, make: Callable[[Path], Callable[[], object]]
) -> None:
    run = make(tmp_path)
    run()
    out = tmp_path / "out"
    records = sorted(out.rglob("*.json")) + sorted(out.rglob("index.safetensors"))
    whole = {path: Manifest.load(path.parent).hash for path in out.rglob("manifest.json")}
    assert whole and len(records) >= 4
    for path in records:
        before = path.read_bytes()
        for damage in DAMAGES:
            path.write_bytes(before[: len(before) // 2] if damage is None else damage)
            run()
            assert {path: Manifest.load(path.parent).hash for path in out.rglob("manifest.json")} == whole, (
                path,
                damage,
            )
            for manifest in whole:
                Manifest.load(manifest.parent).verify(deep=True)
    json.loads(records[0].read_bytes())
    shard = next(out.rglob("*.tar"))
    shard.unlink()
    (shard.parent / ".x.tar.1-2.tmp").write_bytes(b"half")
    run()
    assert shard.is_file() and not list(out.rglob(".*")), (
        "a shard that went is made again, and what was half-written goes"
    )
