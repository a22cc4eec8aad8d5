"""`rectify likelihood`: flows and flow matching in one table, in nats and bits per dimension."""

import json
import math
from typing import Any

import pytest
import torch

from data.dequantised import Dequantised
from data.pack import pack
from data.plane import Plane
from deploy.pipeline import command
from models import normalizing_flow as flows
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.description import describe
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.helpers.commands import REPOSITORY, succeed
from tests.helpers.pipelines import read_stages
from tests.helpers.refusals import assert_refused
from tests.helpers.teachers import save_teacher, save_weights
from tests.helpers.training import fit_words, study_config, train
from trainer.jobs.likelihood import format_table, training_seconds

SPLINE = study_config("flows", "spline")
PIPELINE = REPOSITORY / "configs/flows/pipeline.yaml"
SHORT = ("--data.batch", "32", "--metrics.every", "1")


@pytest.fixture(scope="module", autouse=True)
def restore_threads():
    """Restore the number of threads, which the verb sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder of runs on the plane, each after two steps."""
    folder = tmp_path_factory.mktemp("runs")
    small = ("--model.flow.width", "16", "--model.flow.depth", "1")
    train(SPLINE, folder / "spline", *SHORT, steps=2)
    train(study_config("flows", "continuous"), folder / "continuous", *SHORT, *small, steps=2)
    train(study_config("flows", "matching"), folder / "matching", *SHORT, steps=2)
    return folder


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    """Return the likelihoods of all runs."""
    out = tmp_path_factory.mktemp("measured") / "found.json"
    names = ", ".join(str(runs / name) for name in ("spline", "continuous", "matching"))
    data = ("--data", "Plane", "--data.distribution", "two_moons", "--data.seed", "1")
    words = ("--samples", "100", "--batch", "60", "--out", out)
    succeed("likelihood", "--run", f"[{names}]", *data, *words)
    return json.loads(out.read_text())


def test_runs_of_every_kind_are_measured_in_order(runs, measured):
    names = [str(runs / name) for name in ("spline", "continuous", "matching")]
    assert [row["run"] for row in measured["runs"]] == names
    assert measured["data"] == "two_moons (seed 1)"


def test_a_spline_flow_is_measured_exactly(runs, measured):
    spline = measured["runs"][0]
    x = Plane("two_moons", seed=1).points[:100].view(-1, 2, 1, 1)
    truth = -flows.load_flow(runs / "spline").log_prob(x).mean().item()
    assert spline["nats"] == pytest.approx(truth, abs=1e-4)
    assert spline["step"] == 2
    assert spline["samples"] == 100


def test_points_have_no_bits_and_a_spline_no_evaluations(measured):
    spline = measured["runs"][0]
    assert spline["bits_per_dim"] is None
    assert spline["nfe"] is None


def test_a_generator_is_measured_along_its_ode(measured):
    matching = measured["runs"][2]
    assert matching["model"] == "Linear(sigma_min=0.0) + Velocity()"
    assert matching["nfe"] > 10


def test_the_printed_table_has_the_figures(runs, tmp_path, capsys):
    names = f"[{runs / 'spline'}, {runs / 'continuous'}]"
    data = ("--data", "Plane", "--data.distribution", "two_moons", "--samples", "10")
    succeed("likelihood", "--run", names, *data, "--out", tmp_path / "found.json")
    nats = json.loads((tmp_path / "found.json").read_text())["runs"][0]["nats"]
    printed = capsys.readouterr().out
    assert "| SplineFlow |" in printed
    assert "| ContinuousFlow |" in printed
    assert f"| {nats:.3f} |" in printed


@pytest.mark.parametrize("probes", [0, 2], ids=["exact", "estimated"])
def test_bits_of_an_untrained_generator_are_those_of_the_normal_distribution(tmp_path, probes):
    """An untrained DiT predicts u = 0, so its flow is the identity.

    Its bits per dimension are therefore those of N(0, 1) at the dequantised levels.
    """
    pack(tmp_path / "images", size=4)
    net = DiT(size=4, channels=1, width=8, heads=2, depth=1)
    run = save_teacher(tmp_path / "run", Denoiser(net, Linear(), Velocity()), Unconditional())
    images = tmp_path / "images/heldout"
    data = ("--data", "Dequantised", "--data.path", images, "--samples", "4")
    settings = ("--tolerance", "1e-3", "--probes", probes, "--out", tmp_path / "found.json")
    succeed("likelihood", "--run", run, *data, *settings)

    (row,) = json.loads((tmp_path / "found.json").read_text())["runs"]
    x = Dequantised(str(images)).read(torch.arange(4).numpy()).x.double()
    nats = ((x.square() + math.log(2 * math.pi)) / 2).mean().item()
    assert row["bits_per_dim"] == pytest.approx(nats / math.log(2) + 7, abs=1e-3)
    assert row["nats"] == pytest.approx(16 * nats, rel=1e-3)
    assert row["shape"] == [1, 4, 4]


def a_result(model: str, nats: float) -> dict[str, Any]:
    """Return a result of one run."""
    return {
        "model": model,
        "parameters": 7,
        "step": 10,
        "seconds": 1.0,
        "nats": nats,
        "bits_per_dim": None,
    }


def test_seeds_of_a_model_share_a_line_of_the_table():
    lines = format_table([a_result("b", 1.0), a_result("a", 2.0), a_result("b", 2.0)]).splitlines()
    assert lines[2:] == [
        "| a | 7 | 10 | 1 | 2.000 | - | 1 |",
        "| b | 7 | 10 | 1 ± 0 | 1.500 ± 0.707 | - | 2 |",
    ]


def test_the_seconds_of_a_resumed_run_are_summed(tmp_path):
    seconds = {1: 2.0, 2: 4.0, 3: 1.0, 4: 3.0}  # the third step is the first after a restart
    lines = [
        json.dumps({"step": step, "seconds": value, "loss": 1.0}) for step, value in seconds.items()
    ]
    (tmp_path / "log").write_text("".join(f"{line}\n" for line in lines))
    assert training_seconds(tmp_path / "log") == 7.0


def test_an_empty_log_has_no_seconds(tmp_path):
    (tmp_path / "log").write_text("")
    assert training_seconds(tmp_path / "log") is None


PLANE = ("--data", "Plane", "--data.distribution", "two_moons")


@pytest.fixture(scope="module")
def more_runs(runs):
    """Add a run of a flow on images and one of an autoencoder; return the folder of all runs."""
    wide = flows.SplineFlow(1, 2)
    weights = {f"flow.{key}": value for key, value in wide.state_dict().items()}
    save_weights(runs / "wide", {"flow": describe(wide)}, weights)
    save_weights(runs / "autoencoder", {"autoencoder": {}}, weights)
    return runs


@pytest.mark.parametrize(
    ("run", "words", "named"),
    [
        ("{runs}/nowhere", PLANE, ("nowhere",)),
        ("{runs}/spline", (*PLANE, "--samples", "0"), ("likelihood", "samples", "0")),
        ("{runs}/spline", ("--data", "Plane", "--data.distribution", "moons"), ("moons",)),
        ("{runs}/spline", ("--data", "Plain"), ("`Plain`", "`Plane`")),
        ("{runs}/wide", PLANE, ("(2, 1, 1)", "(1, 2, 2)")),
        ("{runs}/autoencoder", PLANE, ("autoencoder", "denoiser", "flow")),
        ("[]", PLANE, ("likelihood", "run")),
        ("{runs}/matching", (*PLANE, "--prompts", "x.txt"), ("prompts", "matching")),
    ],
    ids=[
        *("no run", "no samples", "unknown distribution", "misspelt class"),
        *("another shape", "no density", "no runs", "prompts"),
    ],
)
def test_bad_input_is_refused(more_runs, tmp_path, capfd, run, words, named):
    out = tmp_path / "never.json"
    command = ("likelihood", "--run", run.format(runs=more_runs), *words, "--out", out)
    assert_refused(capfd, command, *named)
    assert not out.exists()


def test_training_on_data_without_a_density_is_refused(tmp_path, capfd):
    pack(tmp_path / "images", size=8)
    images = ("--data.source", "Images", "--data.source.path", tmp_path / "images/train")
    command = fit_words(SPLINE, tmp_path / "run", *SHORT, *images, steps=2)
    assert_refused(capfd, command, "data", "Images", "Dequantised")


def test_training_on_data_of_another_shape_is_refused(tmp_path, capfd):
    channels = ("--model.flow.channels", "3")
    command = fit_words(SPLINE, tmp_path / "run", *SHORT, *channels, steps=2)
    assert_refused(capfd, command, "data", "(2, 1, 1)", "(3, 1, 1)")


def test_a_run_of_another_flow_is_not_resumed(tmp_path, capfd):
    run = train(SPLINE, tmp_path / "run", *SHORT, steps=2)
    bins = ("--model.flow.bins", "4")
    assert_refused(capfd, fit_words(SPLINE, run, *SHORT, *bins), run, "bins")


def of_the_plane(stage: dict[str, Any]) -> bool:
    """Return whether a stage of the pipeline is about the plane, not the digits."""
    return "two_moons" in stage["name"]


def test_the_smoke_run_measures_the_digits(tmp_path, capsys):
    """The digits' stages run in this process, with the words of the configuration."""
    for stage in read_stages(PIPELINE):
        if not of_the_plane(stage):
            succeed(*command(stage, tmp_path, smoke=True))
    rows = json.loads((tmp_path / "digits/likelihood.json").read_text())["runs"]
    assert len(rows) == 3
    assert all(math.isfinite(row["nats"]) and row["bits_per_dim"] for row in rows)
    assert capsys.readouterr().out.count("| SplineFlow |") == 1


def test_the_pipeline_measures_every_run_on_the_plane():
    stages = [stage for stage in read_stages(PIPELINE) if of_the_plane(stage)]
    *fits, last = stages
    assert [stage["fit"]["out"] for stage in fits] == last["likelihood"]["run"]
