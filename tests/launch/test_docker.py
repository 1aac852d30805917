"""The images, the compose file and the Kubernetes job, read without a container engine: non-root, exact, closed, no secret."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SECRET = re.compile(r"(?i)(passw(or)?d|secret|token|api_?key|access_?key)\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{8,}")


def constraints() -> dict[str, str]:
    pins = [line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in pins}


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.strip().split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(pair[0].upper(), pair[1] if len(pair) > 1 else "") for pair in pairs]


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile; of an image built in stages, the last one is run."""
    found = []
    steps = instructions(text)
    arguments = dict(rest.partition("=")[::2] for name, rest in steps if name == "ARG")
    stages: set[str] = set()
    user = ""
    for name, rest in steps:
        if name == "FROM":
            user = ""
            image = re.sub(r"\$\{(\w+)\}", lambda m: arguments.get(m[1], ""), rest.split()[0])
            if rest.split()[0] not in stages:
                tag = image.partition("@")[0].partition(":")[2]
                if not re.search(r"\d+\.\d+\.\d+", tag):
                    found.append(f"base image {image} has no exact tag")
                if not re.search(r"\$\{\w*DIGEST\}|@sha256:", rest):
                    found.append(f"base image {image} takes no digest")
            if " AS " in rest.upper():
                stages.add(rest.split()[-1])
        elif name == "USER":
            user = rest
        elif name == "ADD":
            found.append(f"ADD {rest}: COPY files, and fetch with a checked version in RUN")
        if name == "RUN" and re.search(r"\b(curl|wget)\b", rest):
            found.append(f"downloads without a pinned hash: {rest[:60]}")
        if name == "RUN" and re.search(r"pip install(?![^&|]*(-c |--index-url|/apex))", rest):
            found.append(f"installs without constraints: {rest[:60]}")
        if name == "RUN" and re.search(r"pip install[^&|]*\s\"?(nvidia-)?apex\b", rest):
            found.append("installs the unrelated package apex")
        if name in ("ENV", "ARG", "RUN", "LABEL") and SECRET.search(rest):
            found.append(f"a secret in {name}")
        if re.search(r"--extra-index-url|--trusted-host|--privileged", rest):
            found.append(f"{name} {rest[:60]}: mixes indexes or trusts too much")
    if user.split(":")[0] in ("", "0", "root"):
        found.append(f"runs as {user or 'root'}")
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles(file: Path) -> None:
    assert complaints(file.read_text()) == []


def test_there_are_both() -> None:
    assert [file.name for file in DOCKERFILES] == ["cpu.Dockerfile", "gpu.Dockerfile"]


@pytest.mark.parametrize(
    ("offence", "found"),
    [
        ("FROM python:latest\nUSER 1", "exact tag"),
        ("FROM python:3.11.13@sha256:00\nRUN true", "runs as root"),
        ("FROM python:3.11.13@sha256:00\nUSER 0:0", "runs as 0:0"),
        ("FROM python:3.11.13\nUSER 1", "no digest"),
        ("ARG D_DIGEST=\nFROM python:3.11.13${D_DIGEST} AS a\nUSER 1\nFROM a", "runs as root"),
        ("FROM python:3.11.13@sha256:00\nADD https://example.org/x /x\nUSER 1", "ADD"),
        ("FROM python:3.11.13@sha256:00\nENV API_KEY=abcdef0123456789\nUSER 1", "secret"),
        ("FROM python:3.11.13@sha256:00\nRUN pip install -c c.txt \\\n  apex\nUSER 1", "unrelated"),
        ("FROM python:3.11.13@sha256:00\nRUN pip install torch\nUSER 1", "without constraints"),
        ("FROM python:3.11.13@sha256:00\nRUN pip install -c c --extra-index-url https://x y\nUSER 1", "mixes"),
        ("FROM python:3.11.13@sha256:00\nRUN curl https://x | sh\nUSER 1", "downloads"),
    ],
)
def test_planted_offences_are_found(offence: str, found: str) -> None:
    assert any(found in complaint for complaint in complaints(offence)), complaints(offence)


def test_versions_are_those_of_the_constraints() -> None:
    pins = constraints()
    cpu = dict(
        rest.partition("=")[::2]
        for name, rest in instructions((DOCKER / "cpu.Dockerfile").read_text())
        if name == "ARG"
    )
    assert cpu["TORCH_VERSION"] == pins["torch"]
    gpu = dict(
        rest.partition("=")[::2]
        for name, rest in instructions((DOCKER / "gpu.Dockerfile").read_text())
        if name == "ARG"
    )
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"][0].startswith(f"flash-attn=={gpu['FLASH_ATTN_VERSION']};")
    assert re.fullmatch(r"[0-9a-f]{40}", gpu["APEX_COMMIT"])
    (torch_bound,) = [
        line
        for line in tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
        if line.startswith("torch")
    ]
    assert gpu["TORCH_VERSION"].startswith("2.11") and torch_bound == "torch>=2.11,<2.14"
    assert ray_job()["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    for file in DOCKERFILES:  # nothing else is pinned twice
        pinned = set(re.findall(r"([a-z][a-z0-9-]+)==[0-9]", file.read_text()))
        assert pinned == set(), f"{file.name} pins {pinned}; constraints.txt does"


def test_one_version_of_the_project() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    package = (REPO / "nexus_scale" / "__init__.py").read_text()
    assert f'__version__ = "{version}"' in package
    for file in DOCKER.iterdir():
        assert set(re.findall(r"nexus-scale-(?:cpu|gpu):([^\s\"']+)", file.read_text())) <= {version}, file.name


# ------------------------------------------------------------------------------------------------- compose


def compose() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return value


@pytest.mark.parametrize("name", ["head", "worker"])
def test_compose_services_are_closed(name: str) -> None:
    service = compose()["services"][name]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & set(service)
    assert "shm_size" in service
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "RAY_AUTH_TOKEN" not in service["environment"], "a token in the environment is shown by docker inspect"
    assert service["secrets"] == ["ray_token"]
    assert "shared:/shared" in service["volumes"]
    assert not any("docker.sock" in volume for volume in service["volumes"])
    assert re.fullmatch(r"nexus-scale-cpu:\d+\.\d+\.\d+", service["image"])
    assert not any("ray-client-server-port" in word for word in service["command"])


def test_compose_is_a_head_and_two_workers_on_loopback() -> None:
    services = compose()["services"]
    assert set(services) == {"head", "worker"}
    assert services["worker"]["deploy"]["replicas"] == 2
    assert "ports" not in services["worker"]
    assert services["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert "--head" in services["head"]["command"]
    assert "--address=head:6379" in services["worker"]["command"]


def test_compose_takes_its_token_from_a_file_outside_the_repository() -> None:
    assert compose()["secrets"]["ray_token"]["file"].startswith("${RAY_TOKEN_FILE:?")


# ---------------------------------------------------------------------------------------------- kubernetes


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / "rayjob.yaml").read_text()))


def ray_job() -> dict[str, Any]:
    (job,) = [document for document in documents() if document["kind"] == "RayJob"]
    return job


def pods() -> list[dict[str, Any]]:
    spec = ray_job()["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_the_ray_job_asks_for_a_token() -> None:
    assert ray_job()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "ray-client-server-port" not in (DOCKER / "rayjob.yaml").read_text()


def test_pods_are_closed() -> None:
    assert len(pods()) == 3
    for pod in pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= set(container["resources"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_the_network_policy_covers_every_pod() -> None:
    (policy,) = [document for document in documents() if document["kind"] == "NetworkPolicy"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    for pod in pods():
        assert selector.items() <= pod["metadata"]["labels"].items()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule.get("from") for rule in policy["spec"]["ingress"]), "a rule without `from` lets everyone in"
    assert all(rule.get("to") for rule in policy["spec"]["egress"])


def test_gpus_asked_for_are_those_of_the_cluster_file() -> None:
    job = ray_job()["spec"]
    name = job["entrypoint"].split("--cluster ")[1].split()[0]
    cluster = yaml.safe_load((REPO / "configs" / "cluster" / f"{name}.yaml").read_text())
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = [(g["replicas"], g["template"]["spec"]["containers"][0]["resources"]["limits"]) for g in groups]
    assert (
        sum(n * int(limit["nvidia.com/gpu"]) for n, limit in limits) == cluster["workers"] * cluster["gpus_per_worker"]
    )
    assert sum(n * int(limit["cpu"]) for n, limit in limits) >= cluster["workers"] * cluster["cpus_per_worker"]


@pytest.mark.parametrize("file", sorted(DOCKER.iterdir()), ids=lambda file: file.name)
def test_no_secret_and_no_loose_tag(file: Path) -> None:
    text = file.read_text()
    assert not SECRET.search("\n".join(line for line in text.splitlines() if "RAY_TOKEN_FILE" not in line))
    assert not re.search(r":latest\b", text)
