"""`rectify likelihood`: flows and the flow-matching model in one table, in nats and bits per dimension."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.dequantised import Dequantised
from data.images import pack
from data.plane import Plane
from deploy.cli import main
from deploy.run import command, load
from models import flow as flows
from models import teacher
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.conftest import REPOSITORY
from trainer.likelihood import spent, table

CONFIGS = {path.stem: path for path in (REPOSITORY / "configs/flows").glob("*.yaml")}
FEW = ("--data.batch", "32", "--metrics.every", "1", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Leave the number of threads as it was: the verb fixes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fit(name, out, *words, code=0):
    words = ("--config", str(CONFIGS[name]), "--out", str(out), "--trainer.max_steps", "2", *FEW, *words)
    assert main(["fit", *words]) == code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the plane, of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    fit("spline", folder / "spline")
    fit("continuous", folder / "continuous", "--model.flow.width", "16", "--model.flow.depth", "1")
    fit("matching", folder / "matching")
    return folder


def test_the_table_holds_runs_of_every_kind(runs, tmp_path, capsys):
    names = [str(runs / name) for name in ("spline", "continuous", "matching")]
    words = ("--data", "Plane", "--data.law", "two_moons", "--data.seed", "1", "--out", str(tmp_path / "found.json"))
    assert not main(["likelihood", "--run", f"[{', '.join(names)}]", *words, "--samples", "100", "--batch", "60"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["run"] for row in found["runs"]] == names and found["data"] == "two_moons (seed 1)"
    spline = found["runs"][0]
    assert spline["step"] == 2 and spline["samples"] == 100 and spline["bits_per_dim"] is None and spline["nfe"] is None
    x = Plane("two_moons", seed=1).points[:100].view(-1, 2, 1, 1)
    truth = -flows.load(runs / "spline").log_prob(x).mean().item()
    assert spline["nats"] == pytest.approx(truth, abs=1e-4)
    matching = found["runs"][2]
    assert matching["model"] == "Linear(sigma_min=0.0) + Velocity()" and matching["nfe"] > 10
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("SplineFlow", "ContinuousFlow")) and f"| {spline['nats']:.3f} |" in printed


def test_bits_of_an_untrained_generator_are_those_of_the_normal_law(tmp_path):
    """A DiT starts by predicting u = 0, so that its flow is the identity: bits/dim is N(0, 1)'s at the dequantised levels."""
    pack(tmp_path / "images", size=4)
    denoiser = Denoiser(DiT(size=4, channels=1, width=8, heads=2, depth=1), Linear(), Velocity())
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    rectify = {"format": teacher.FORMAT, "codec": None, "denoiser": teacher.describe(denoiser)}
    rectify["condition"] = teacher.describe(Unconditional())
    weights = {f"denoiser.{key}": value for key, value in denoiser.state_dict().items()}
    torch.save({"rectify": rectify, "state_dict": weights, "global_step": 0}, tmp_path / "run/checkpoints/step=0.ckpt")
    words = ("--run", str(tmp_path / "run"), "--data", "Dequantised", "--data.path", str(tmp_path / "images/heldout"))
    common = (*words, "--samples", "4", "--tolerance", "1e-3", "--out", str(tmp_path / "found.json"))
    for probes in ("0", "2"):
        assert not main(["likelihood", *common, "--probes", probes])
        (row,) = json.loads((tmp_path / "found.json").read_text())["runs"]
        x = Dequantised(str(tmp_path / "images/heldout")).read(torch.arange(4).numpy()).x.double()
        nats = ((x.square() + math.log(2 * math.pi)) / 2).mean().item()
        assert row["bits_per_dim"] == pytest.approx(nats / math.log(2) + 7, abs=1e-3)
        assert row["nats"] == pytest.approx(16 * nats, rel=1e-3) and row["shape"] == [1, 4, 4]


def test_seeds_share_a_row():
    def row(model, nats):
        return {"model": model, "parameters": 7, "step": 10, "seconds": 1.0, "nats": nats, "bits_per_dim": None}

    lines = table([row("b", 1.0), row("a", 2.0), row("b", 2.0)]).splitlines()
    assert lines[2:] == ["| a | 7 | 10 | 1 | 2.000 | - | 1 |", "| b | 7 | 10 | 1 ± 0 | 1.500 ± 0.707 | - | 2 |"]


def test_the_seconds_of_a_resumed_run_are_summed(tmp_path):
    lines = [{"step": step, "seconds": seconds, "loss": 1.0} for step, seconds in ((1, 2.0), (2, 4.0), (3, 1.0), (4, 3.0))]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(tmp_path / "log") == 7.0
    (tmp_path / "log").write_text("")
    assert spent(tmp_path / "log") is None


@pytest.fixture
def refused(capfd):
    def run(*words):
        assert main([str(word) for word in words]) == 2
        said = capfd.readouterr().err.strip().splitlines()
        lines = [line for line in said if line.startswith("rectify: error: ")]
        assert lines == said[-1:], said
        return lines[0]

    return run


PLANE = ("--data", "Plane", "--data.law", "two_moons", "--out", "never.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--run", "nowhere", *PLANE), "nowhere: no such run folder"),
        (("--run", "{runs}/spline", *PLANE, "--samples", "0"), "samples (0)"),
        (("--run", "{runs}/spline", "--data", "Plane", "--data.law", "moons", "--out", "x"), "moons"),
        (("--run", "{runs}/spline", "--data", "Plain", "--out", "x"), "no class `Plain`; did you mean `Plane`?"),
        (("--run", "{runs}/wide", *PLANE), "a sample has the shape (channels, size, size) = (2, 1, 1), the model (1, 2, 2)"),
        (("--run", "{runs}/autoencoder", *PLANE), "holds neither a denoiser nor a flow"),
        (("--run", "[]", *PLANE), "run names no run"),
        (("--run", "{runs}/matching", *PLANE, "--prompts", "x.txt"), "is told no texts; leave them out"),
    ],
)
def test_bad_input_is_one_line(runs, refused, words, said):
    wide = flows.SplineFlow(1, 2)
    rectify = {"wide": {"flow": teacher.describe(wide)}, "autoencoder": {"autoencoder": {}}}
    for name, about in rectify.items():
        (runs / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        weights = {f"flow.{key}": value for key, value in wide.state_dict().items()}
        whole = {"rectify": {"format": teacher.FORMAT, **about}, "state_dict": weights, "global_step": 0}
        torch.save(whole, runs / name / "checkpoints/step=0.ckpt")
    assert said in refused("likelihood", *(word.format(runs=runs) for word in words))
    assert not Path("never.json").exists()


def test_training_on_what_has_no_density_is_refused(tmp_path, refused):
    pack(tmp_path / "images", size=8)
    images = ("--data.source", "Images", "--data.source.path", tmp_path / "images/train")
    common = ("fit", "--config", CONFIGS["spline"], "--out", tmp_path / "run", *FEW)
    assert "which have no density; give Dequantised" in refused(*common, *images)
    line = refused(*common, "--model.flow.channels", "3")
    assert "(2, 1, 1), the model (3, 1, 1)" in line
    fit("spline", tmp_path / "run")
    assert "holds a run of another model" in refused(*common, "--model.flow.bins", "4")


def test_the_pipeline_runs_in_its_quick_form(tmp_path, capsys):
    """The digits' stages with the words of the configuration, in this process; the plane's measure what its fits write."""
    stages = load(CONFIGS["pipeline"])["stages"]
    for stage in stages:
        if "two_moons" not in stage["name"]:
            assert not main(command(stage, tmp_path, quick=True)), stage
    rows = json.loads((tmp_path / "digits/likelihood.json").read_text())["runs"]
    assert len(rows) == 3 and all(math.isfinite(row["nats"]) and row["bits_per_dim"] for row in rows)
    assert capsys.readouterr().out.count("| SplineFlow |") == 1
    moons = [stage for stage in stages if "two_moons" in stage["name"]]
    assert [stage["fit"]["out"] for stage in moons[:-1]] == moons[-1]["likelihood"]["run"]
