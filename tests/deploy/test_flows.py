"""Normalizing flows through the command line: they learn, and they resume."""

import pytest
import torch

from models import normalizing_flow as flows
from tests.helpers.training import losses, study_config, train

SHORT = ("--data.batch", "32", "--metrics.every", "1")
SMALL = ("--model.flow.width", "16", "--model.flow.depth", "1")
ROUGH = ("--model.flow.tolerance", "0.01")
ESTIMATED = ("--model.flow.estimate", "true", *ROUGH)
SPLINE = study_config("flows", "spline")
CONTINUOUS = study_config("flows", "continuous")


@pytest.mark.parametrize(
    ("config", "words"), [(SPLINE, ()), (CONTINUOUS, ROUGH)], ids=["spline", "continuous"]
)
def test_training_lowers_the_loss(tmp_path, config, words):
    found = losses(train(config, tmp_path / "run", *SHORT, *SMALL, *words, steps=60))
    assert len(found) == 60
    assert sum(found[-5:]) / 5 < found[0] - 0.1


@pytest.mark.parametrize(
    ("config", "words"), [(SPLINE, ()), (CONTINUOUS, ESTIMATED)], ids=["spline", "continuous"]
)
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, config, words):
    whole = train(config, tmp_path / "whole", *SHORT, *words, steps=4)
    for steps in (2, 4):
        resumed = train(config, tmp_path / "resumed", *SHORT, *words, steps=steps)
    expected, found = (flows.load_flow(run).state_dict() for run in (whole, resumed))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert losses(whole) == losses(resumed)
