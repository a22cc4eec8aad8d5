"""The pipeline, its report, and every published configuration and command."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from functools import partial

import pytest
import yaml
from PIL import Image

from data.shards import ShardReader
from deploy.cli import main
from tests.conftest import REPOSITORY, Workspace

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
PIPELINES, RUNS = ([path for path in CONFIGS if part in yaml.safe_load(path.read_text())] for part in ("stages", "model"))


def test_the_summary_has_its_seams(workspace):
    summary = json.loads((workspace.path / "runs/demo/summary.json").read_text())
    assert summary["floor"] >= 0 and summary["export_max_abs_diff"] <= 1e-4
    for model in ("teacher", "student"):
        assert set(summary[model]) == {"1", "2", "4", "8", "32"}
        assert all({"fd", "accuracy", "nfe", "recall"} <= row.keys() for row in summary[model].values())
        assert [summary[model][steps]["nfe"] for steps in ("1", "32")] == [1, 32]
    assert {"pack", "autoencoder", "encode", "teacher", "collect", "student", "export"} <= summary["seconds"].keys()


def test_the_held_out_split_is_never_trained_on(workspace):
    runs = workspace.path / "runs/demo"
    configs = [yaml.safe_load((runs / run / "config.yaml").read_text()) for run in ("autoencoder", "teacher", "student")]
    paths = [config["data"]["source"]["init_args"]["path"] for config in configs]
    assert paths == ["runs/demo/images/train", "runs/demo/latents", "runs/demo/pairs"]
    train, heldout = (ShardReader(runs / "images" / split) for split in ("train", "heldout"))
    seen, unseen = ([reader[i]["png"].tobytes() for i in range(len(reader))] for reader in (train, heldout))
    assert len(seen) == 1617 and len(unseen) == 180 and not set(seen) & set(unseen)
    assert json.loads((runs / "latents/manifest.json").read_text())["samples"] == 1617


def test_latents_have_unit_variance(workspace):
    import numpy as np

    from data.latents import Latents

    source = Latents(str(workspace.path / "runs/demo/latents"))
    x = source.read(np.arange(1617)).x
    assert x.std().item() == pytest.approx(1, abs=0.01) and source.manifest["scale"] > 0


def test_a_second_run_only_prints(workspace):
    began = time.monotonic()
    again = workspace.rectify("run", "configs/digits/pipeline.yaml", "--quick", "true")
    assert again.stderr.count("finished") == 10 and "student" in again.stdout and time.monotonic() - began < 15


def test_logs_hold_every_step_and_wandb_stays_offline(workspace):
    run = workspace.path / "runs/demo/teacher"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [20]
    assert list((run / "wandb").glob("offline-run-*"))


def chromium():
    """Return the browser, installing Debian's where that is possible."""
    if not (found := shutil.which("chromium")) and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run("apt-get update && apt-get install -y --no-install-recommends chromium", shell=True, capture_output=True)
        found = shutil.which("chromium")
    return found or pytest.skip("no chromium, and no right to install it")


def test_the_report_opens_in_a_browser(workspace, tmp_path):
    page = workspace.path / "runs/demo/report.html"
    assert not re.search(r"(src|href)=\"(?!data:)", page.read_text()), "the report is not self-contained"
    shot = tmp_path / "shot.png"
    words = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    words += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    size = ["--window-size=1150,2600", f"--screenshot={shot}"]
    subprocess.run([*words, *size, f"file://{page}"], capture_output=True, timeout=120)
    image = Image.open(shot).convert("RGB")
    assert image.size[0] == 1150 and len(image.getcolors(2**24)) > 500, "the page is blank"
    dom = subprocess.run([*words, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<img") == 13 and "recall_ratio" in dom and "rectify collect" in dom


@pytest.fixture
def rectify(workspace, monkeypatch):
    """Run a command in this process, in the workspace: what it imports it need not import again for every command."""
    monkeypatch.chdir(workspace.path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def run(*words):
        try:
            assert main([str(word) for word in words]) == 0, words
        except SystemExit as ended:  # of --help
            assert not ended.code, words

    return run


@pytest.mark.parametrize("path", [path for path in RUNS if path.parent.name != "text"], ids=lambda path: path.stem)
def test_every_config_trains_a_step(rectify, tmp_path, path):
    """Those of text students are run in test_text, which makes their teacher."""
    header = path.read_text().splitlines()
    command = next(line for line in header if line.startswith("#   rectify"))
    words = shlex.split(command.removeprefix("#   rectify "))
    rectify(*words, "--out", tmp_path / "run", "--trainer.max_steps", "1")
    assert list((tmp_path / "run" / "checkpoints").glob("step=000000001.ckpt"))


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_pipeline_names_configs_that_exist(path):
    from deploy.run import command, load

    pipeline = load(path)
    for stage in pipeline["stages"]:
        words = command(stage, path.parent, quick=True)
        assert all((REPOSITORY / word).is_file() for word in words if word.endswith(".yaml"))


def commands(document):
    """Return the `rectify` commands of a document's code blocks."""
    blocks = re.findall(r"^(?:    |```\w*\n)(.*?)(?:\n(?!    )|```)", (REPOSITORY / document).read_text(), re.M | re.S)
    lines = [line.strip().partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith(("rectify ", "torchrun "))]


def test_every_command_in_the_readme_runs(workspace, rectify):
    """In order, in a folder where the quick pipeline has run; training is cut short, nothing else is changed."""
    found = commands("README.md")
    assert len(found) >= 8
    photos = workspace.path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for i in range(60):
            Image.effect_noise((80, 70), 40 + i).convert("RGB").save(photos / name / f"{i}.png")
    for line in found:
        words = shlex.split(line)
        call = partial(workspace.rectify, processes=2) if words[0] == "torchrun" else rectify
        words = words[words.index("deploy") + 1 :] if words[0] == "torchrun" else words[1:]
        quick = {"run": ["--quick", "true"], "fit": ["--trainer.max_steps", "2"], "collect": ["--pairs", "300", "--steps", "2"]}
        quick["picture"] = ["--updates", "2"]
        call(*words, *([] if "--help" in words else quick.get(words[0], [])))


def test_a_killed_pipeline_leaves_nothing_at_work_and_goes_on(tmp_path):
    """SIGKILL of the pipeline's own process alone, in the middle of a stage; then the same command."""
    place = Workspace(tmp_path)
    stages = yaml.safe_load((REPOSITORY / "configs/digits/pipeline.yaml").read_text())
    stages["stages"] = stages["stages"][:2]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(stages))
    process = place.start("run", "short.yaml", "--quick", "true")
    while not (tmp_path / "runs/demo/autoencoder/config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    again = place.rectify("run", "short.yaml", "--quick", "true")
    assert "[1/2] pack: finished" in again.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "runs/demo/autoencoder/metrics.jsonl").open()] == [20]
