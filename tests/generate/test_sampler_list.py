"""`nexus samplers`: the list says what is so."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from nexus_scale.cli import app
from nexus_scale.config import registry
from nexus_scale.config.recipe import load_recipe
from nexus_scale.generate import sampler_list

CHAIN, NOISE_ALONE, EDM = sampler_list.KINDS


def test_each_sampler_is_there_with_what_it_needs() -> None:
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["samplers", "--json"]).stdout)}
    assert set(rows) == set(registry.names("samplers"))
    assert {name for name, row in rows.items() if row["noise"]} == {
        *(
            "ancestral",
            "autoregressive",
            "consistency",
            "dpm",
            "euler_ancestral",
            "interpolant_sde",
            "lcm",
            "masked",
            "restart",
            "tcd",
        ),
    }
    asked = {name: row["evaluations"] for name, row in rows.items() if row["evaluations"] not in (10, None)}
    assert asked == {"heun": 19, "midpoint": 19, "pndm": 11, "restart": asked["restart"]} and asked["restart"] > 19
    assert rows["heun"]["walks"] == [CHAIN, EDM] and rows["ancestral"]["walks"] == [CHAIN, NOISE_ALONE]
    assert rows["ddim"]["walks"] == [CHAIN, NOISE_ALONE, EDM] and rows["ddim"]["settings"]["eta"] == 0
    assert all(row["about"] and row["misfit"] is None for row in rows.values())


def test_a_recipe_is_drawn_by_those_that_fit() -> None:
    rows = {row.name: row for row in sampler_list.rows(load_recipe("mmdit/tiny_openmoji", tiny=True))}
    assert {"ode", "ddim", "dpm_multistep"} <= {name for name, row in rows.items() if row.misfit == ""}
    assert "infinite at t = 1" in str(rows["heun"].misfit) and "learned" in str(rows["ancestral"].misfit)
    shown = sampler_list.show(list(rows.values()))
    assert "    draws this recipe" in shown and "    cannot draw this recipe: sample: {name: heun}" in shown
