"""Every private name of Ray that this program uses, with why, and with what goes wrong when Ray moves it.

Ray's public API places the workers (placement groups), runs them (actors) and tells of their end (`ray.wait`). What it has no public
word for stands here and nowhere else (tests/test_architecture.py); pyproject.toml pins Ray exactly, and
tests/orchestration/test_ray_internals.py tries each, so that an upgrade fails with the name that moved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

DEMAND_EXPIRES_S = 180.0


def free_resources() -> dict[str, Mapping[str, float]]:
    """Free resources of each live node, by its id.

    Name: `ray._private.state.available_resources_per_node`. Why: the public `ray.available_resources` sums over the cluster, and a
    worker has to fit on one node; the public state API needs the dashboard, which a local cluster does without. When it moves: no run
    starts (`check_resources`), and an elastic one cannot be sized.
    """
    from ray._private import state

    return state.available_resources_per_node()


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to be taken away: their ids, and until when, in milliseconds since the epoch (0: unknown).

    Name: `ray._private.state.state.get_draining_nodes`. Why: `ray.nodes` does not tell, and `ray.train.get_preemption_info` is for the
    workers of Ray Train. When it moves: a notice of preemption goes unseen, and a run loses the steps since its last checkpoint.
    """
    from ray._private import state

    return dict(state.state.get_draining_nodes())


@contextmanager
def loopback() -> Iterator[None]:
    """Lets `ray.init` within take 127.0.0.1 for this machine's address, as RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 does.

    Name: `ray._private.ray_constants.ENABLE_RAY_CLUSTER`. Why: Ray reads the variable when it is imported, which may have been before.
    When it moves: a local cluster's servers listen on every interface (test_orchestration `out_of_reach`).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"].lower() in ("1", "true")
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def read_authentication_again() -> None:
    """Lets Ray read RAY_AUTH_MODE and its token again.

    Names: `ray._raylet.Config`, `ray._raylet.AuthenticationTokenLoader`. Why: Ray reads both when it is imported, which may have been
    before. When they move: a local cluster asks for no token, or this program cannot join its own cluster (test_orchestration `token`).
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def ask_for_machines(requester: str, bundles: Sequence[Mapping[str, float]]) -> None:
    """Asks the autoscaler of a cluster for machines that hold these bundles; it forgets the request after `DEMAND_EXPIRES_S`.

    Name: `ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator.get_or_create_autoscaling_coordinator`. Why: requests
    by the public `ray.autoscaler.sdk.request_resources` replace each other, so that two runs on one cluster would take turns, and they
    outlive a program that was killed. When it moves: a cluster does not grow for a run; one of fixed size does not notice.
    """
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    wanted = [dict(bundle) for bundle in bundles]
    ray.get(
        coordinator.request_resources.remote(requester_id=requester, resources=wanted, expire_after_s=DEMAND_EXPIRES_S)
        if wanted
        else coordinator.cancel_request.remote(requester_id=requester),
        timeout=5,
    )
