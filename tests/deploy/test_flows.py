"""Flows through the command line: they learn, and resume."""

import json

import pytest
import torch

from deploy.cli import main
from models import flow as flows
from tests.conftest import REPOSITORY

FEW = ("--data.batch", "32", "--metrics.every", "1", "--trainer.accelerator", "cpu")


def fit(name, out, *words, steps=2):
    config = str(REPOSITORY / "configs/flows" / f"{name}.yaml")
    assert not main(["fit", "--config", config, "--out", str(out), "--trainer.max_steps", str(steps), *FEW, *words])


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


@pytest.mark.parametrize("name", ["spline", "continuous"])
def test_maximum_likelihood_lowers_the_loss(tmp_path, name):
    rough = ("--model.flow.tolerance", "0.01") if name == "continuous" else ()
    fit(name, tmp_path, "--model.flow.width", "16", "--model.flow.depth", "1", *rough, steps=60)
    found = losses(tmp_path)
    assert len(found) == 60 and sum(found[-5:]) / 5 < found[0] - 0.1


@pytest.mark.parametrize("name", ["spline", "continuous"])
def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(tmp_path, name):
    estimate = ("--model.flow.estimate", "true", "--model.flow.tolerance", "0.01") if name == "continuous" else ()
    for run, steps in (("whole", (4,)), ("cut", (2, 4))):
        for step in steps:
            fit(name, tmp_path / run, *estimate, steps=step)
    whole, cut = (flows.load(tmp_path / run).state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
