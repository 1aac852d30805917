"""What must hold of dependencies, settings and every file of the repository, whatever the code does."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pathspec import GitIgnoreSpec

from nexus_scale import recipe
from nexus_scale.contracts import UserError
from nexus_scale.doctor import UNSAFE

REPO = Path(__file__).resolve().parent.parent

FLOORS = {
    "torch": ("2.10", "CVE-2025-32434 and CVE-2026-24747: code and memory corruption in weights_only loading"),
    "ray": ("2.60", "CVE-2023-48022, CVE-2026-27482, GHSA-hhrp-gw25-jr43, GHSA-mw35-8rx3-xf9r; token authentication"),
    "transformers": ("5.3", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839: remote code from a model folder"),
    "diffusers": ("0.38", "CVE-2026-44513: remote code from a pipeline folder"),
    "deepspeed": ("0.18.3", "wrong ZeRO-2 gradients in 0.17.6 to 0.18.2"),
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


def test_weights_only_refuses_a_planted_pickle(tmp_path: Path) -> None:
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
        recipe.read_yaml(file)
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
        recipe.read_yaml(file)


# ------------------------------------------------------------------------------- the environment (S3, S4, S17)


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
        hidden = {".venv", ".git", "runs", "data", "dist", "build"}
        names = [
            f.relative_to(REPO).as_posix()
            for f in REPO.rglob("*")
            if f.is_file() and f.relative_to(REPO).parts[0] not in hidden
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
