"""Shards in object stores: never a wrong byte, whatever the store does; kept on disk, and shared by processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import Progress
from nexus_scale.data import stores
from nexus_scale.data.cache import ShardCache
from nexus_scale.data.errors import StoreError
from nexus_scale.data.loader import BadData, DataError, Dataset, Loader, Source
from nexus_scale.data.manifest import Field, Manifest, hash_open
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.stores import open_store, placed
from nexus_scale.io import incidents
from tests.distributed import script, until

torch.set_num_threads(1)
SAMPLES, PER_SHARD, BATCH = 64, 8, 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for first in range(0, SAMPLES, PER_SHARD):
        with ShardWriter(
            tmp_path / "d" / f"{first // PER_SHARD}.tar", [Field("x", "x.npy", "float32", (9,))]
        ) as writer:
            for number in range(first, first + PER_SHARD):
                writer.write(f"{number:06d}", {"x": np.full(9, number, np.float32)})
    finish_folder(tmp_path / "d")
    return tmp_path / "d"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NEXUS_CACHE_BYTES", raising=False)
    monkeypatch.setattr(stores.Store.__init__, "__kwdefaults__", {"tries": 4, "deadline_s": 20.0, "backoff_s": 0.01})
    return tmp_path / "cache"


class Server:
    """A store on this machine that misbehaves: `plan[file]` is a list of what it does to the next answers for that file."""

    def __init__(self, folder: Path, ranges: bool = True):
        self.plan: dict[str, list[str]] = {}
        self.requests: list[str] = []
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                return None

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                if not (folder / name).is_file():
                    return self.send_error(404)
                data = (folder / name).read_bytes()
                whole = len(data)
                wanted = self.headers.get("Range")
                if wanted and ranges:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    data = data[int(first) : int(last) + 1]
                does = ""
                if self.command == "GET":
                    outer.requests.append(name)
                    does = outer.plan.get(name, [""]).pop(0) if outer.plan.get(name) else ""
                if does == "500":
                    return self.send_error(500)
                if does == "404":
                    return self.send_error(404)
                if does == "hang":
                    time.sleep(2.5)
                if does == "flip":
                    data = bytes([data[0] ^ 1]) + data[1:]
                if does == "longer":
                    data += b"more"
                length = len(data)
                if does == "shorter":
                    data, length = data[:-7], length - 7
                self.send_response(206 if wanted and ranges else 200)
                self.send_header("Content-Length", str(length))
                if wanted and ranges:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
                self.end_headers()
                if self.command == "HEAD":
                    return None
                if does == "cut":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                if does == "trickle":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
                else:
                    self.wfile.write(data)
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/d"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(folder: Path, **settings: Any) -> Server:
        servers.append(Server(folder, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()


def samples(dataset: Dataset, draws: int = 8, **settings: Any) -> tuple[np.ndarray, Loader]:
    """Samples of each draw, their values checked."""
    settings = {"progress": Progress(), **settings}
    loader = Loader(dataset, seed=1, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, **settings)
    seen = []
    try:
        for _ in range(draws):
            (batch,) = loader.next_batches()
            assert torch.equal(batch["x"], batch.samples.float()[:, None].expand(-1, 9))
            seen.append(batch.samples.numpy())
    finally:
        loader.close()
    return np.stack(seen), loader


def test_the_same_samples_from_anywhere(folder: Path, serve: Callable[..., Server], cache: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/far/{path.name}", path.read_bytes())
    here, _ = samples(Dataset.open([Source([folder])], window=2))
    for url in ("memory://far", folder.as_uri(), serve(folder).url, serve(folder, ranges=False).url + "/"):
        dataset = Dataset.open([Source([url])], window=2, verify="hashes")
        assert dataset.hash == Dataset.open([Source([folder])], window=2).hash
        there, _ = samples(dataset)
        assert np.array_equal(here, there)
        ranged, _ = samples(Dataset.open([Source([url])], window=2, memory_bytes=64))
        assert np.array_equal(here, ranged)
    kept = [path.name for path in cache.iterdir() if not path.name.startswith(".")]
    assert sorted(kept) == sorted(shard.xxh3_128 for shard in Manifest.load(folder).shards)
    memory.rm("/far", recursive=True)


def test_each_shard_is_fetched_once_and_ahead(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    dataset = Dataset.open([Source([server.url])], window=2)
    server.requests.clear()
    loader = Loader(dataset, seed=1, global_batch=4, micro_batch=4, rank=0, world_size=1, progress=Progress(), prefetch=0)  # fmt: skip
    loader.next_batches()
    assert loader._reader._pool is not None  # type: ignore[attr-defined]
    loader._reader._pool.shutdown()  # type: ignore[attr-defined]  # waits for what was asked for
    loader._reader._pool = None  # type: ignore[attr-defined]
    assert len(server.requests) == 4 == len(set(server.requests))  # this window and the next, though one batch was read
    for _ in range(2 * SAMPLES // 4):
        loader.next_batches()
    loader.close()
    assert sorted(server.requests) == [f"{n}.tar" for n in range(8)]


@pytest.mark.parametrize("does", ["500", "cut", "shorter", "longer", "flip", "hang", "trickle"])
def test_a_store_that_misbehaves_for_a_while(
    folder: Path, tmp_path: Path, serve: Callable[..., Server], does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = 1.0 if does in ("hang", "trickle") else 20.0
    monkeypatch.setattr(
        stores.Store.__init__, "__kwdefaults__", {"tries": 4, "deadline_s": deadline, "backoff_s": 0.01}
    )
    here, _ = samples(Dataset.open([Source([folder])], window=2))
    server = serve(folder)
    dataset = Dataset.open([Source([server.url])], window=2)
    server.plan = {"3.tar": [does, does], "6.tar": [does]}
    there, loader = samples(dataset, note=partial(incidents.note, tmp_path))
    assert np.array_equal(here, there) and loader.replaced == 0 and loader.wait_seconds > 0
    (row,) = incidents.read(tmp_path)  # one a minute
    assert row["kind"] == "slow_store" and ".tar" in row["message"] and row["store"] == server.url


def test_a_store_that_stays_away(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    dataset = Dataset.open([Source([server.url])], window=2)
    server.plan = {f"{n}.tar": ["500"] * 100 for n in range(8)}
    assert dataset.bad.action == "replace"  # but an outage is no bad data
    with pytest.raises(StoreError, match=r"500.*try 4 of 4"):
        samples(dataset)
    with pytest.raises(StoreError, match=r"500.*try 4 of 4"):
        samples(dataset, prefetch=0)
    server.plan.clear()
    samples(dataset)
    server.plan = {"index.safetensors": ["flip"] * 10}
    with pytest.raises(DataError, match=r"index\.safetensors: got hash"):
        Dataset.open([Source([server.url])])


@pytest.mark.parametrize("does", ["flip", "404", "shorter"])
def test_a_shard_that_is_bad_in_the_store(folder: Path, serve: Callable[..., Server], does: str) -> None:
    server = serve(folder)
    dataset = Dataset.open([Source([server.url])], window=2, bad=BadData(limit=0.2))
    server.plan = {"5.tar": [does] * 1000}
    here, _ = samples(Dataset.open([Source([folder])], window=2))
    there, loader = samples(dataset)
    bad = here // PER_SHARD == 5
    assert np.array_equal(here != there, bad) and loader.replaced == bad.sum()
    (folder / "5.tar").unlink()
    with pytest.raises(DataError, match=r"5\.tar: missing shard"):
        Dataset.open([Source([server.url])])


def test_a_cached_file_that_went_bad_is_fetched_again(folder: Path, serve: Callable[..., Server], cache: Path) -> None:
    dataset = Dataset.open([Source([serve(folder).url])], window=2)
    first, _ = samples(dataset, 4)
    for number, path in enumerate(sorted(p for p in cache.iterdir() if not p.name.startswith("."))):
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data[: len(data) - number % 2])
    for memory_bytes in (1 << 20, 64):
        again, loader = samples(Dataset.open(
            [Source([dataset.sources[0][0].where])], window=2, memory_bytes=memory_bytes), 4)  # fmt: skip
        assert np.array_equal(first, again) and loader.replaced == 0


def test_the_cache_stays_below_its_limit(
    folder: Path, serve: Callable[..., Server], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "0.tar").stat().st_size
    monkeypatch.setenv("NEXUS_CACHE_BYTES", str(3 * size))
    here, _ = samples(Dataset.open([Source([folder])], window=2))
    there, _ = samples(Dataset.open([Source([serve(folder).url])], window=2))
    assert np.array_equal(here, there)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * size
    monkeypatch.setenv("NEXUS_CACHE_BYTES", "1000")
    with pytest.raises(DataError, match="NEXUS_CACHE_BYTES higher"):
        samples(Dataset.open([Source([serve(folder).url])], window=2, verify="none"), 16)
    monkeypatch.setenv("NEXUS_CACHE_BYTES", "much")
    with pytest.raises(DataError, match="a number of bytes"):
        open_store("memory://far")


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "c", 30)
    fetched: list[str] = []

    def get(name: str) -> None:
        def fetch(file: Any) -> None:
            fetched.append(name)
            file.write(b"0123456789")

        os.close(cache.open(name, 10, fetch))
        os.utime(cache.folder / name, ns=(0, 1000 * clock.pop(0)))

    clock = list(range(1, 20))
    for name in ("aa", "bb", "cc", "aa", "dd", "aa", "bb"):
        get(name)
    assert fetched == ["aa", "bb", "cc", "dd", "bb"] and not (cache.folder / "cc").exists()


FETCH = """
import os, sys
from nexus_scale.data.manifest import Manifest, hash_open
manifest = Manifest.load(sys.argv[1])
print("begins", flush=True)
for shard in range(len(manifest.shards)):
    assert hash_open(manifest.open(shard)) == manifest.shards[shard].xxh3_128
print("done", flush=True)
"""


def test_processes_share_what_one_of_them_fetched(folder: Path, serve: Callable[..., Server]) -> None:
    server = serve(folder)
    logs = [folder.parent / f"log{number}" for number in range(2)]
    processes = [script(FETCH, server.url, log=log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        process.join(120)
        assert process.exitcode == 0 and log.read_text().endswith("done\n"), log.read_text()
    assert sorted(name for name in server.requests if name.endswith(".tar")) == [f"{n}.tar" for n in range(8)]


def test_a_process_killed_while_it_fetches_leaves_no_wrong_file(
    folder: Path, serve: Callable[..., Server], cache: Path
) -> None:
    server = serve(folder)
    server.plan = {"2.tar": ["trickle"]}
    process = script(FETCH, server.url, log=folder.parent / "log")
    until(lambda: list(cache.glob(".*.partial")) and "2.tar" in server.requests)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    manifest = Manifest.load(server.url)
    digests = {shard.xxh3_128 for shard in manifest.shards}
    whole = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert len(whole) == 2 and list(cache.glob(".*.partial"))
    for path in whole:
        assert path.name in digests and hash_open(os.open(path, os.O_RDONLY)) == path.name
    for shard in range(8):
        os.close(manifest.open(shard))
    assert not list(cache.glob(".*.partial"))  # whoever fetched it next cleared it away


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("pipe:cat /etc/passwd", "got scheme 'pipe'"),
        ("ftp://host/d", "got scheme 'ftp'"),
        ("simplecache::s3://bucket/d", "expected one of s3"),
        ("http://example.org/d", "got scheme 'http'"),
        ("github://a:b@/d", "got scheme 'github'"),
        ("https://user:canary@host/d", "credentials"),
        ("https://host/d?token=abc", "credentials"),
    ],
)
def test_urls_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as raised:
        Dataset.open([Source([placed(Path("/data"), url)])])
    assert "word" not in str(raised.value) and "abc" not in str(raised.value)
    assert placed(Path("/data"), "a/b") == Path("/data/a/b")


def test_a_folder_that_is_not_there(folder: Path, serve: Callable[..., Server]) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        Manifest.load("memory://nowhere")
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read"):
        Manifest.load(serve(folder).url)


def test_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").clear_instance_cache()
        s3 = fsspec.filesystem("s3")
        s3.mkdir("shards")
        for path in folder.iterdir():
            s3.pipe_file(f"shards/d/{path.name}", path.read_bytes())
        here, _ = samples(Dataset.open([Source([folder])], window=2))
        there, _ = samples(Dataset.open([Source(["s3://shards/d"])], window=2, verify="hashes"))
        assert np.array_equal(here, there)
        s3.rm("shards/d/3.tar")
        s3.invalidate_cache()
        with pytest.raises(DataError, match=r"s3://shards/d/3\.tar: missing shard"):
            Dataset.open([Source(["s3://shards/d"])])
    finally:
        moto.stop()
