"""Each private name of Ray that is used: there, and doing what it is used for. An upgrade that moves one fails here, with its name."""

from __future__ import annotations

import ast
import inspect
import os
import tomllib
from collections.abc import Iterator
from importlib import import_module, metadata
from operator import attrgetter
from pathlib import Path

import pytest

from nexus_scale.orchestration import ray_internals, security
from nexus_scale.orchestration.cluster import connected

REPO = Path(__file__).resolve().parents[2]

NAMES = [
    ("ray._private.state", "available_resources_per_node"),
    ("ray._private.state", "state.get_draining_nodes"),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    ("ray._raylet", "AuthenticationTokenLoader"),
    ("ray._raylet", "Config"),
    (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "get_or_create_autoscaling_coordinator",
    ),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_name_is_there(module: str, name: str) -> None:
    try:
        attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"ray {metadata.version('ray')} has no {module}.{name}: {error}")


def test_each_name_is_explained_and_no_other_is_used() -> None:
    source = inspect.getsource(ray_internals)
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    private = {module for module in modules if module and module.startswith("ray.") and "._" in module}
    assert private == {module.removesuffix(".state").removesuffix(".ray_constants") for module, _ in NAMES}
    functions = [each for each in vars(ray_internals).values() if inspect.isfunction(each)]
    words = [inspect.getdoc(each) or "" for each in functions if each.__module__ == ray_internals.__name__]
    assert len(words) == 5 and all("Why:" in text and "When " in text for text in words)
    for module, name in NAMES:
        assert sum(f"`{module}.{name}`" in text for text in words) == 1, f"{module}.{name} is not explained"


def test_ray_is_pinned_to_the_version_that_these_names_were_tried_with() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = {line.partition("==")[2] for line in [*project["dependencies"], *extras] if line.startswith("ray[")}
    assert wanted == {metadata.version("ray")}
    assert f"ray=={metadata.version('ray')}" in (REPO / "constraints.txt").read_text().splitlines()


def test_a_loopback_address_is_taken_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """ray._private.ray_constants.ENABLE_RAY_CLUSTER"""
    from ray._private import services

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    with ray_internals.loopback():
        assert services.get_node_ip_address() in ("127.0.0.1", "::1")


def test_a_token_that_is_set_after_the_import_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ray._raylet.Config and AuthenticationTokenLoader"""
    from ray._raylet import AuthenticationTokenLoader

    for number in (1, 2):
        path = security.write_token(tmp_path / f"token{number}")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        ray_internals.read_authentication_again()
        header = AuthenticationTokenLoader.instance().get_token_for_http_header()
        assert path.read_text() in str(header)
    monkeypatch.undo()
    ray_internals.read_authentication_again()


# ------------------------------------------------------------------------------------------- on a real Ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with connected():
        yield


@pytest.mark.ray
def test_free_resources_are_those_of_each_node(local_ray: None) -> None:
    """ray._private.state.available_resources_per_node"""
    import ray

    (node,) = ray.nodes()
    assert ray_internals.free_resources()[node["NodeID"]]["CPU"] == len(os.sched_getaffinity(0))


@pytest.mark.ray
def test_no_node_of_a_fresh_cluster_is_drained(local_ray: None) -> None:
    """ray._private.state.state.get_draining_nodes; test_elastic drains one."""
    assert ray_internals.draining_nodes() == {}


@pytest.mark.ray
def test_machines_are_asked_for_and_the_request_is_taken_back(local_ray: None) -> None:
    """get_or_create_autoscaling_coordinator: its reservations, which Ray Data asks for, show what was asked for."""
    ray_internals.ask_for_machines("a run", [{"CPU": 1.0}, {"CPU": 0.5}])
    ray_internals.ask_for_machines("a run", [])
