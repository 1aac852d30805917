"""What must hold of dependencies, settings and every file of the repository, whatever the code does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pathspec import GitIgnoreSpec

from nexus_scale.certify.page import table as certificate_table
from nexus_scale.config import plain_yaml, recipe
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.trained import make_draw
from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration.compiled import keep_compiled_code_apart
from nexus_scale.report.page import write_report
from nexus_scale.run.doctor import UNSAFE
from nexus_scale.run.runs import accepted_hashes, follow, open_run, prepare_run, resolve_run, summary_of
from nexus_scale.train import Place, train
from tests.distributed import nexus

REPO = Path(__file__).resolve().parent.parent

FLOORS = {
    "torch": ("2.10", "CVE-2025-32434 and CVE-2026-24747: code and memory corruption in weights_only loading"),
    "ray": ("2.60", "CVE-2023-48022, CVE-2026-27482, GHSA-hhrp-gw25-jr43, GHSA-mw35-8rx3-xf9r; token authentication"),
    "transformers": ("5.3", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839: remote code from a model folder"),
    "diffusers": ("0.38", "CVE-2026-44513: remote code from a pipeline folder"),
    "deepspeed": ("0.18.3", "wrong ZeRO-2 gradients in 0.17.6 to 0.18.2"),
    "aiohttp": (
        "3.14.3",
        "CVE-2025-69223 to -69230, CVE-2026-22815, CVE-2026-54273 to -54280, CVE-2026-69244: floods, smuggling",
    ),
    "pyyaml": ("5.4", "CVE-2020-14343: code in full_load"),
    "pillow": ("10.3", "CVE-2023-50447, CVE-2024-28219"),
}


def requirements() -> list[Requirement]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def constraints() -> dict[str, str]:
    lines = [line.strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------------- versions (S2, S4, S7, S8)


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_below_the_security_floor_is_admitted(name: str) -> None:
    floor, why = FLOORS[name]
    bounds = [r.specifier for r in requirements() if canonical(r.name) == name]
    assert bounds, f"{name} is not asked for"
    for bound in bounds:
        lowest = [Version(s.version) for s in bound if s.operator in (">=", "==", "~=")]
        assert lowest, f"{name}{bound} admits any version"
        assert min(lowest) >= Version(floor), f"{name}{bound} admits less than {floor}: {why}"
    pinned = {canonical(key): value for key, value in constraints().items()}[name]
    assert Version(pinned) >= Version(floor), why


@pytest.mark.parametrize("name", [*FLOORS, "pydantic", "safetensors"])
def test_what_is_installed_is_admitted(name: str) -> None:
    version = importlib.metadata.version(name)
    for requirement in requirements():
        if canonical(requirement.name) == name:
            assert requirement.specifier.contains(version, prereleases=True), f"{name} {version} is not {requirement}"


def test_wrong_zero_gradients_are_not_admitted() -> None:
    (deepspeed,) = [r for r in requirements() if r.name == "deepspeed"]
    for version in ("0.17.6", "0.18.0", "0.18.2"):
        assert not deepspeed.specifier.contains(version)


# ------------------------------------------------------------------------- where packages come from (S11, S12, S13)


def test_every_constraint_is_an_exact_version() -> None:
    for line in (REPO / "constraints.txt").read_text().splitlines():
        assert (
            not line or line.startswith("#") or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line)
        ), line


def test_every_dependency_is_constrained_and_admits_its_constraint() -> None:
    pins = {canonical(name): version for name, version in constraints().items()}
    for requirement in requirements():
        name = canonical(requirement.name)
        if name == "nexus-scale" or name == "flash-attn":  # ourselves; exact in pyproject.toml, and on GPUs alone
            continue
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} excludes {pins[name]}"


def test_flash_attn_is_exact_and_apex_is_nowhere() -> None:
    (flash,) = [r for r in requirements() if canonical(r.name) == "flash-attn"]
    assert [s.operator for s in flash.specifier] == ["=="]
    asked = {canonical(r.name) for r in requirements()} | {canonical(name) for name in constraints()}
    assert not asked & {"apex", "nvidia-apex"}, (
        "the package apex is an unrelated project, and nvidia-apex anyone could register"
    )


MIXED = re.compile(r"--extra-index-url|extra-index-url|PIP_EXTRA_INDEX_URL|--find-links|--trusted-host")


def test_indexes_are_never_mixed() -> None:
    """Two indexes at once let the one with the higher version win: dependency confusion."""
    assert MIXED.search("pip install --extra-index-url https://example.org/simple x")
    for path in (
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        ".ci/run",
        *(f"docker/{f.name}" for f in (REPO / "docker").iterdir()),
    ):
        assert not MIXED.search((REPO / path).read_text()), path


# ------------------------------------------------------------------------------- loading runs no code (S1, S6)


class Planted:
    """Unpickling an instance makes a file: the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.canary), "w")


def test_weights_only_refuses_a_planted_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Set for good by the first command of this process.
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    canary, file = tmp_path / "executed", tmp_path / "model_states.pt"
    torch.save({"step": Planted(canary)}, file)
    with pytest.raises(Exception, match=r"(?i)weights"):
        torch.load(file, weights_only=True)
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists(), "the fixture itself is dead"


TAGS = (
    "a: !!python/object/apply:builtins.open ['{canary}', 'w']",
    "a: !!python/object/new:builtins.open ['{canary}', 'w']",
    "? !!python/object/apply:builtins.open ['{canary}', 'w']\n: 1",
    "a: !!python/name:os.system",
    "a: !anything 1",
)


@pytest.mark.parametrize("text", TAGS)
def test_a_recipe_with_a_tag_is_refused(tmp_path: Path, text: str) -> None:
    canary, file = tmp_path / "executed", tmp_path / "recipe.yaml"
    file.write_text(text.format(canary=canary))
    with pytest.raises(UserError, match="not plain YAML"):
        plain_yaml.read_yaml(file)
    assert not canary.exists()


def test_the_tag_fixture_is_live(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    yaml.unsafe_load(TAGS[0].format(canary=canary))
    assert canary.exists()


def test_a_tag_on_the_command_line_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    with pytest.raises(UserError, match="not plain YAML"):
        recipe.overrides_of([f"steps=!!python/object/apply:builtins.open ['{canary}', 'w']"])
    assert not canary.exists()


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(UserError, match="'steps' is given twice"):
        plain_yaml.read_yaml(file)


def planted(file: Path, canary: Path) -> None:
    """A pickle that makes the canary, in the place of a file that is read back."""
    if file.suffix in (".pt", ".safetensors"):
        torch.save({"step": Planted(canary)}, file)
    else:
        file.write_bytes(pickle_of(Planted(canary)))


def pickle_of(value: object) -> bytes:
    return ForkingPickler.dumps(value).tobytes()


def read_back(run: RunFolder, data: Path) -> list[Callable[[], object]]:
    """Everything that reads files of a run or of its data."""
    return [
        lambda: open_run(run.path),
        lambda: summary_of(run),
        lambda: list(follow(run)),
        lambda: [newest(run.checkpoints)],
        lambda: [leaving.asked(run.path), incidents.read(run.path), accepted_hashes(run)],
        lambda: write_report(run),
        lambda: [json.loads(path.read_bytes()) for path in (run.environment, run.path / "stages.json")],
        lambda: go_on_with(run),
        lambda: Dataset.open([Source([data], 1.0, None)]).fixed(4, rank=0, world_size=1, batch=4),
        lambda: list(Dataset.open([Source([data], 1.0, None)]).fixed(4, rank=0, world_size=1, batch=4)),
    ]


def go_on_with(run: RunFolder) -> None:
    values = recipe.load_recipe("mmdit/tiny_openmoji", {"callbacks": QUIET, "steps": 4}, tiny=True)
    train(values, recipe.cluster_from({"workers": 0}, "test"), Place(run, run.path, run.path.parent), make_draw)


QUIET = {"checkpoint": {"every": 1}, "metrics": {"every": 1}, "validate": {"every": 2, "samples": 4}, "samples": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a folder of data with every kind of file that the program reads back."""
    root = tmp_path_factory.mktemp("written")
    run = RunFolder(root / "run")
    values = recipe.load_recipe("mmdit/tiny_openmoji", {"callbacks": QUIET}, tiny=True)
    cluster = recipe.cluster_from({"workers": 0}, "test")
    prepare_run(run, values, cluster)
    train(values, cluster, Place(run, root, root), make_draw)
    write_report(run)
    leaving.ask(run.path, "test")
    incidents.note(run.path, "straggler", "test")
    for name in ("stages.json", "changes.jsonl"):
        (run.path / name).write_text("[]")
    fields = [
        Field("text", "text.npy", "float16", (None, 2)),
        Field("caption", "txt", "text"),
        Field("label", "cls", "int64", ()),
    ]
    with ShardWriter(root / "data" / "00000.tar", fields) as writer:
        for number in range(8):
            writer.write(f"{number:06d}", {"text": np.zeros((2, 2), np.float16), "caption": "a", "label": number})
    finish_folder(root / "data", encoder={"fingerprint": "t5"})
    return root


def test_no_file_that_is_read_back_can_run_code(written: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    kinds = {path.name for path in files}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "MANIFEST.json", "leave.json", "00000.tar"} <= kinds, (
        kinds
    )
    assert any(path.suffix == ".safetensors" for path in files)
    refused = set()
    for number, file in enumerate(files):
        root, canary = tmp_path / str(number), tmp_path / f"executed-{number}"
        shutil.copytree(written, root)
        planted(root / file, canary)
        for read in read_back(RunFolder(root / "run"), root / "data"):
            try:
                read()
            except Exception:
                refused.add(file.name)
        assert not canary.exists(), f"{file}: ran code"
        shutil.rmtree(root)
    assert {"recipe.yaml", "environment.json", "00000.tar", "leave.json"} <= refused, "these were not read at all"


def test_the_planted_fixture_is_live(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    ForkingPickler.loads(pickle_of(Planted(canary)))
    assert canary.exists()


# ------------------------------------------------------------------------------- names and words of others (S16)


@given(name=st.text(min_size=1, max_size=40))
@example(name="../../etc/passwd")
@example(name="/etc/passwd")
@example(name="..")
@example(name="a/../../b")
@example(name="a\\x00b")
def test_no_name_of_a_run_leaves_the_root(name: str) -> None:
    root = Path("/nowhere/runs")
    try:
        found = resolve_run(name, root)
    except (UserError, ValueError):
        return
    assert found.parent == root or found == root or Path(name).is_dir(), found
    assert ".." not in found.parts[len(root.parts) :] or Path(name).is_dir()


@given(words=st.text(alphabet=st.sampled_from("<>&\"'/ascript=on xyz\n"), max_size=60))
@settings(deadline=None)
def test_no_word_becomes_markup_in_a_certificate(words: str) -> None:
    shown = certificate_table((words,), [[words]])
    inside = re.sub(r"</?(div|table|thead|tbody|tr|th|td)( class=\"scroll\")?>", "", shown)
    assert not set(inside) & set("<>\"'"), inside


# ------------------------------------------------------------------------------- the environment (S3, S4, S17)


def test_compiled_code_lies_in_a_folder_of_this_run_and_user_alone(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder = keep_compiled_code_apart(tmp_path / "runs" / "one", environment)
    assert environment["TORCH_EXTENSIONS_DIR"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    others = {
        keep_compiled_code_apart(tmp_path / where / "one", {"XDG_CACHE_HOME": str(tmp_path / "cache")})
        for where in ("a", "b")
    }
    assert len(others | {folder}) == 3
    folder.chmod(0o777)
    keep_compiled_code_apart(tmp_path / "runs" / "one", {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert keep_compiled_code_apart(tmp_path, {"TORCH_EXTENSIONS_DIR": "/mine"}) == Path("/mine")


def test_compiled_code_is_not_put_behind_a_link(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder = keep_compiled_code_apart(tmp_path / "one", dict(environment))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="does not belong to this user"):
        keep_compiled_code_apart(tmp_path / "one", environment)


@pytest.mark.parametrize("name", UNSAFE)
def test_nothing_here_undoes_safe_loading(name: str) -> None:
    assert name not in os.environ
    setting = re.compile(rf"{name}[\"']?\s*[=:,]\s*[\"']?(1|true|yes)", re.IGNORECASE)
    assert setting.search(f'{name}="1"')
    for path, text in tracked_texts():
        assert not setting.search(text) or path.startswith("tests/"), path


def test_nothing_compiles_cpp_at_run_time() -> None:
    builders = re.compile(r"cpp_extension|load_inline|OpBuilder\(\)\.load")
    for path, text in tracked_texts():
        if path.endswith(".py") and not path.startswith("tests/"):
            assert not builders.search(text), f"{path} builds an extension"


# ------------------------------------------------------------------------------------------- secrets (S9, S10)

CANARY = "CANARY-" + "7f3a9c"

SHORT_RUN = """
import os, sys
from nexus_scale import main_job
from nexus_scale.cli import guarded
settings = ["steps=4", "callbacks.checkpoint={every: 2}", "callbacks.metrics={every: 1, wandb: {mode: offline, project: p}}"]
guarded(lambda: main_job.main("mmdit/tiny_openmoji", settings, tiny=True))
"""


def mentions(root: Path, canary: str) -> list[str]:
    return [str(path) for path in root.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.ray
def test_a_canary_in_argv_environment_and_url_is_nowhere_after_a_run(tmp_path: Path) -> None:
    """F13: 0 hits in logs, configs, manifests, metrics, W&B's files and attempts/, of a real run with two workers."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "WANDB"))},
        "PYTHONPATH": str(REPO), "HOME": str(tmp_path / "home"), "NEXUS_RUNS_ROOT": str(tmp_path / "runs"),
        "NEXUS_DATA_ROOT": str(tmp_path / "data"), "WANDB_API_KEY": (CANARY * 4)[:40], "HF_TOKEN": CANARY,
        "AWS_SECRET_ACCESS_KEY": CANARY, "HTTPS_PROXY": f"http://user:{CANARY}@127.0.0.1:9",
    }  # fmt: skip
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SHORT_RUN, CANARY],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    names = {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {"recipe.yaml", "MANIFEST.json", "metrics.jsonl", "rank_1.log", "report.html"} <= names
    assert any(name.endswith(".wandb") for name in names), names
    assert mentions(tmp_path, CANARY) == []


def test_mentions_finds_a_canary(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"x{CANARY}y")
    assert mentions(tmp_path, CANARY) == [str(tmp_path / "a")]


@pytest.mark.parametrize(
    "words",
    [f"api_key={CANARY}", f"callbacks.metrics.wandb.api_key={CANARY}", f"cluster.token={CANARY}", f"hf_token={CANARY}"],
)
def test_a_secret_as_a_setting_is_refused_and_not_repeated(words: str, tmp_path: Path) -> None:
    code, said = nexus(
        tmp_path, "train", "mmdit/tiny_openmoji", "--tiny", words, NEXUS_RUNS_ROOT=str(tmp_path / "runs")
    )
    assert code == 2 and said, said
    assert CANARY not in said
    assert mentions(tmp_path, CANARY) == []


SECRETS = re.compile(
    "|".join(
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
            r"\bAKIA[0-9A-Z]{16}\b",
            r"\bhf_[A-Za-z0-9]{30,}\b",
            r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
            r"\bsk-[A-Za-z0-9]{40,}\b",
            r"(?i:wandb_api_key)[\"']?\s*[=:]\s*[\"']?[0-9a-f]{40}\b",
            r"https?://[^/\s:@]+:[^/\s:@{$]+@",
        )
    )
)


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Text files that git would carry; all files where this is not a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.split("\0") if name]
    else:
        caches = {".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
        hidden = {".venv", ".git", "runs", "data", "dist", "build"} | caches
        names = [
            f.relative_to(REPO).as_posix()
            for f in REPO.rglob("*")
            if f.is_file() and f.relative_to(REPO).parts[0] not in hidden and "__pycache__" not in f.parts
        ]
    for name in names:
        file = REPO / name
        if file.is_file() and file.stat().st_size < 2**20:
            try:
                yield name, file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_secret_is_in_the_repository() -> None:
    for path, text in tracked_texts():
        if path != "tests/test_security.py":
            found = [m for m in SECRETS.finditer(text) if "canary" not in m[0].lower()]
            assert not found, f"{path}: looks like a secret at character {found[0].start()}"


PLANTED = (
    "AKIA" + "A" * 16,
    "hf_" + "a" * 34,
    "WANDB_API_KEY=" + "0" * 40,
    "https://user:word@example.org",
    "-----BEGIN RSA PRIVATE KEY-----",
)


@pytest.mark.parametrize("secret", PLANTED)
def test_planted_secrets_are_found(secret: str) -> None:
    assert SECRETS.search(f"x = '{secret}'")


STAYS = (
    ".env",
    ".env.local",
    "a.pem",
    "a.key",
    ".netrc",
    ".venv/bin/python",
    "runs/a/recipe.yaml",
    "data/a.tar",
    ".git/config",
)
GOES = (
    "nexus_scale/train.py",
    "nexus_scale/data/loader.py",
    "data_pipelines/ingest_images.py",
    "configs/quickstart.yaml",
    "launch/train.py",
    "constraints.txt",
)


@pytest.mark.parametrize("ignore", [".rayignore", ".dockerignore"])
def test_secrets_and_bulk_do_not_travel_and_code_does(ignore: str) -> None:
    spec = GitIgnoreSpec.from_lines((REPO / ignore).read_text().splitlines())
    assert [path for path in STAYS if not spec.match_file(path)] == []
    assert [path for path in GOES if spec.match_file(path)] == []


def test_python_bounds_are_those_that_are_tested() -> None:
    bounds = SpecifierSet(tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["requires-python"])
    assert [v for v in ("3.10", "3.11", "3.12", "3.13", "3.14") if v in bounds] == ["3.11", "3.12", "3.13"]
