"""`nexus score --settings` of a file with `likelihood:`: bits for each value of held-out data, of a run that was trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.contracts import UserError
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.generate.trained import Trained
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained_on_made_up_data(tmp_path_factory.mktemp("likelihood"), "flow_matching/tiny_fashion_mnist")


def settings(folder: Path, **values: object) -> str:
    write_yaml(folder / "settings.yaml", {"likelihood": {"samples": 6, "batch": 4, "tolerance": 0.01, **values}})
    return str(folder / "settings.yaml")


def test_a_run_is_scored_by_the_likelihood_of_data(flow: Place, tmp_path: Path) -> None:
    """A network that has learned next to nothing answers zero: its flow moves little, and the data's density is the noise's."""
    found = evaluate.score(flow, settings(tmp_path))
    assert json.loads((flow.run.path / "likelihood.json").read_text()) == found
    assert (found["samples"], found["draws"], found["divergence"]) == (6, 1, "estimated")
    assert found["evaluations"] >= 8 and found["bits_error"] > 0 and found["straightness"] >= 0
    batch = next(Trained(flow.run, flow).dataset.fixed(6, batch=6)).on("cpu")
    noise = torch.distributions.Normal(0.0, 1.0).log_prob(batch["image"]).mean() / -torch.log(torch.tensor(2.0))
    assert found["bits"] == pytest.approx(float(noise), rel=0.2)
    again = evaluate.score(flow, settings(tmp_path, batch=6))
    assert again["bits"] == pytest.approx(found["bits"], rel=0.02), "draws are by sample; only the steps are shared"
    assert evaluate.score(flow, settings(tmp_path, seed=1))["bits"] != found["bits"]


def test_a_family_without_a_likelihood_and_other_mistakes_are_named(flow: Place, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        evaluate.score(flow, settings(tmp_path, folders=["nowhere"]))
    with pytest.raises(UserError, match="divergence"):
        evaluate.score(flow, settings(tmp_path, divergence="guessed"))
    gan = trained_on_made_up_data(tmp_path, "gan/tiny_fashion_mnist")
    with pytest.raises(UserError, match="objective Adversarial knows no likelihood"):
        evaluate.score(gan, settings(tmp_path))
