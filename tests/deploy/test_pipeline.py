"""The pipeline, its report, and every published configuration and command."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data.latents import Latents
from data.shards import ShardReader
from deploy.pipeline import command, load
from deploy.targets import compare_with_targets
from tests.helpers.commands import REPOSITORY, Workspace, run_command
from tests.helpers.pipelines import read_stages

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
PIPELINES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
BASES = [path for path in CONFIGS if path.name == "base.yaml"]
# A file with `out` and no stages is a run; a base is none by itself.
RUNS = [
    path
    for path in CONFIGS
    if yaml.safe_load(path.read_text()).keys() & {"out", "stages"} == {"out"}
]
SMOKE_RUN = ("run", "configs/digits/pipeline.yaml", "--smoke")


@pytest.fixture(scope="module")
def demo(workspace):
    """Return the folder of the demo, a smoke run of the digits' pipeline."""
    return workspace.path / "runs/demo"


@pytest.fixture(scope="module")
def summary(demo):
    """Return the summary of the demo."""
    return json.loads((demo / "summary.json").read_text())


def test_the_summary_compares_with_its_floors(summary):
    assert summary["floor"] >= 0
    assert summary["export_max_abs_diff"] <= 1e-4


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_the_summary_has_the_quality_by_steps(summary, model):
    rows = summary[model]
    assert set(rows) == {"1", "2", "4", "8", "32"}
    assert all({"fd", "accuracy", "nfe", "recall"} <= row.keys() for row in rows.values())
    assert rows["1"]["nfe"] == 1
    assert rows["32"]["nfe"] == 32


def test_the_summary_has_the_targets_of_the_pipeline(summary):
    targets = load(REPOSITORY / "configs/digits/pipeline.yaml").targets
    assert len(targets) == 6
    assert summary["targets"] == compare_with_targets(summary, targets, "")


def test_the_summary_has_the_seconds_of_every_stage(summary):
    stages = {"pack", "autoencoder", "encode", "teacher", "collect", "student", "export"}
    assert stages <= summary["seconds"].keys()


@pytest.mark.parametrize(
    ("run", "path"),
    [
        ("autoencoder", "runs/demo/images/train"),
        ("teacher", "runs/demo/latents"),
        ("student", "runs/demo/pairs"),
    ],
)
def test_every_run_reads_the_training_split(demo, run, path):
    config = yaml.safe_load((demo / run / "config.yaml").read_text())
    assert config["data"]["source"]["init_args"]["path"] == path


def images_of(folder: Path) -> list[bytes]:
    """Return the pixels of every image of a set."""
    reader = ShardReader(folder)
    return [reader[i]["png"].tobytes() for i in range(len(reader))]


def test_the_held_out_split_shares_no_image_with_the_training_split(demo):
    train = images_of(demo / "images/train")
    heldout = images_of(demo / "images/heldout")
    assert len(train) == 1617
    assert len(heldout) == 180
    assert not set(train) & set(heldout)
    assert json.loads((demo / "latents/manifest.json").read_text())["samples"] == 1617


def test_latents_have_unit_variance(demo):
    source = Latents(str(demo / "latents"))
    x = source.read(np.arange(1617)).x
    assert x.std().item() == pytest.approx(1, abs=0.01)
    assert source.manifest["scale"] > 0


def test_a_second_run_only_prints(workspace):
    began = time.monotonic()
    again = workspace.rectify(*SMOKE_RUN)
    assert time.monotonic() - began < 15
    assert again.stderr.count("finished") == 10
    assert "student" in again.stdout


def test_the_log_holds_every_step_that_is_due(demo):
    lines = (demo / "teacher/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20]


def test_wandb_stays_offline(demo):
    assert list((demo / "teacher/wandb").glob("offline-run-*"))


def chromium() -> str:
    """Return the browser; install Debian's where that is possible, else skip the test."""
    found = shutil.which("chromium")
    if not found and shutil.which("apt-get") and os.geteuid() == 0:
        install = "apt-get update && apt-get install -y --no-install-recommends chromium"
        subprocess.run(install, shell=True, capture_output=True)
        found = shutil.which("chromium")
    if not found:
        pytest.skip("no chromium, and no right to install it")
    return found


def test_the_report_is_self_contained(demo):
    page = (demo / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_the_report_has_a_table_of_quality(demo):
    page = (demo / "report.html").read_text()
    table = page.partition('<table class="figures">')[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("</tr>")]
    summary = json.loads((demo / "summary.json").read_text())
    assert rows[0] == ["model", "steps", "NFE", "FD", "accuracy", "recall", "precision"]
    model, steps, _, fd, *_ = rows[1]
    assert fd == f"{summary[model][steps]['fd']:.4f}"
    assert len([row for row in rows[1:] if row]) == sum(
        len(summary[name]) for name in summary["first_orderness"]
    )


def test_the_report_opens_in_a_browser(demo, tmp_path):
    page = demo / "report.html"
    shot = tmp_path / "shot.png"
    browser = [
        chromium(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]

    # It is not blank.
    picture = ["--window-size=1150,2600", f"--screenshot={shot}"]
    subprocess.run([*browser, *picture, f"file://{page}"], capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    assert image.size[0] == 1150
    assert len(image.getcolors(2**24)) > 500

    # It has all pictures, the summary and the commands.
    dump = [*browser, "--dump-dom", f"file://{page}"]
    dom = subprocess.run(dump, capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<img") == 13
    assert "recall_ratio" in dom
    assert "rectify collect" in dom


@pytest.fixture
def rectify(workspace, monkeypatch):
    """Return a function that runs a command in the workspace, in this process: imports are done."""
    monkeypatch.chdir(workspace.path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def run(*words: object) -> None:
        try:
            assert run_command(*words) == 0, words
        except SystemExit as help_printed:
            assert not help_printed.code, words

    return run


def header_commands(config: Path) -> list[list[str]]:
    """Return the words of the commands in a config's header, without `rectify`."""
    prefix = "#   rectify "
    lines = [line for line in config.read_text().splitlines() if line.startswith(prefix)]
    return [shlex.split(line.removeprefix(prefix)) for line in lines]


@pytest.mark.parametrize(
    "path",
    [path for path in RUNS if path.name != "autoencoder.yaml"],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_run_is_a_short_file_after_its_base(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert 5 <= len(lines) <= 15
    folder = path.parent.relative_to(REPOSITORY)
    words = f"fit --config {folder}/base.yaml --config {folder}/{path.name}".split()
    assert words in header_commands(path)


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.parent.name)
def test_a_base_has_no_folder_for_a_run(path):
    assert "out" not in yaml.safe_load(path.read_text())


# The configs of text students are run in text/test_text.py, which makes their teacher.
@pytest.mark.parametrize(
    "path",
    [path for path in RUNS if path.parent.name != "text"],
    ids=lambda path: path.stem,
)
def test_every_config_trains_a_step(rectify, tmp_path, path):
    run = tmp_path / "run"
    rectify(*header_commands(path)[0], "--out", run, "--trainer.max_steps", "1")
    assert list((run / "checkpoints").glob("step=000000001.ckpt"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_names_configs_that_exist(path):
    load(path)
    for stage in read_stages(path):
        words = command(stage, path.parent, smoke=True)
        assert all((REPOSITORY / word).is_file() for word in words if word.endswith(".yaml"))


@pytest.mark.slow
def test_a_killed_pipeline_ends_its_stage_and_can_be_continued(tmp_path):
    """SIGKILL hits the pipeline's process alone, in the middle of a stage; then it is run again."""
    workspace = Workspace(tmp_path)
    pipeline = yaml.safe_load((REPOSITORY / "configs/digits/pipeline.yaml").read_text())
    pipeline["stages"] = pipeline["stages"][:2]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(pipeline))
    words = ("run", "short.yaml", "--smoke")
    run = tmp_path / "runs/demo/autoencoder"

    # Kill it as soon as its second stage trains.
    process = workspace.start(*words)
    while not (run / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()

    # The same command skips the first stage; a stage left at work would have added lines.
    again = workspace.rectify(*words)
    assert "[1/2] pack: finished" in again.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20]
