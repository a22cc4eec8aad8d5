"""The exported folder, loaded in a fresh process by plain diffusers, draws what our sampler draws."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from data.files import read_json
from deploy.export import CHECKED, export, on_grid_of
from deploy.pretrained import flow_scheduler
from models import codec as codecs
from models import teacher
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Noise, Velocity

PLAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
out = {}
for steps in map(int, sys.argv[3].split(",")):
    for scale in (1.0, 3.0):
        asked = {"guidance_scale": scale, "num_inference_steps": steps, "generator": torch.manual_seed(5)}
        out[f"{steps} {scale}"] = pipe([0, 3, 9, 9], output_type="pt", **asked).images
torch.save(out, sys.argv[2])
"""


def awake(folder, codec, condition: Condition, interpolant=None, prediction=None, **net):
    """Write a run whose network's every weight matters (adaLN-zero starts at zero), and whose EMA is not its weights."""
    torch.manual_seed(0)
    network = DiT(**{"size": 8, "channels": 4, "patch": 2, "width": 32, "depth": 2, "heads": 4, "classes": 10, **net})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    denoiser = Denoiser(network, interpolant or Linear(), prediction or Velocity())
    (folder / "checkpoints").mkdir(parents=True)
    codecs.load(codec).save(folder / "codec")
    parts = {"denoiser": teacher.describe(denoiser), "condition": teacher.describe(condition)}
    ema = denoiser.state_dict()
    raw = {f"denoiser.{name}": torch.randn_like(value) for name, value in ema.items()}
    spec = {"format": teacher.FORMAT, "codec": "codec", **parts}
    torch.save({"rectify": spec, "ema": ema, "state_dict": raw}, folder / "checkpoints" / "step=000000001.ckpt")
    return folder


@pytest.fixture(scope="module")
def codec(workspace):
    return workspace.path / "runs/demo/latents/codec"


@pytest.mark.parametrize("condition", [ClassLabel(10), Unconditional()], ids=["labels", "none"])
def test_plain_diffusers_draws_the_same_images(codec, condition, tmp_path):
    run = awake(tmp_path / "run", codec, condition, classes=10 if isinstance(condition, ClassLabel) else 0)
    export(run, tmp_path / "out", steps=1)
    (tmp_path / "plain.py").write_text(PLAIN)
    words = [sys.executable, "plain.py", "out", "theirs.pt", ",".join(map(str, CHECKED))]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    denoiser, vae, told = teacher.load(run)
    labels = told(torch.tensor([0, 3, 9, 9]))
    for steps in CHECKED:
        for scale in (1.0, 3.0):
            eps = torch.randn(4, *denoiser.shape, generator=torch.manual_seed(5))
            walk, timed = on_grid_of(flow_scheduler(), denoiser, steps)
            ours = (vae.decode(walk.walk(Guided(timed, scale), eps, labels)[-1]) / 2 + 0.5).clamp(0, 1)
            gap = (theirs[f"{steps} {scale}"] - ours).abs().max().item()
            assert gap <= 1e-4, f"{steps} steps, guidance {scale}: {gap}"
    assert (theirs["4 1.0"][0] - theirs["4 1.0"][1]).abs().max() > 1e-3, "the images say nothing"


def test_the_folder_is_whole_and_safe(codec, tmp_path):
    export(awake(tmp_path / "run", codec, ClassLabel(10)), tmp_path / "out", steps=2)
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"model_index.json", "README.md", "export.json", "scheduler/scheduler_config.json"} <= files
    assert all(name.endswith((".json", ".md", ".safetensors")) for name in files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "guidance_scale=1 " in card and "num_inference_steps=2" in card
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "flow_prediction" and config["use_flow_sigmas"] and config["solver_order"] == 1
    gaps = read_json(tmp_path / "out" / "export.json")["gaps"]
    assert set(gaps) == set(map(str, CHECKED)) and all(gap["native_grid"] > gap["same_grid"] for gap in gaps.values())


def test_what_diffusers_cannot_walk_is_refused(codec, tmp_path):
    run = awake(tmp_path / "run", codec, ClassLabel(10), VariancePreserving(), Noise())
    with pytest.raises(ValueError, match=r"VariancePreserving\(beta_min=0.1, beta_max=20.0\) and Noise\(\); export knows Linear"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_classes_than_the_pipeline_holds_are_refused(codec, tmp_path):
    with pytest.raises(ValueError, match="1200 classes; DiTPipeline holds at most 1000"):
        export(awake(tmp_path / "run", codec, ClassLabel(1200), classes=1200), tmp_path / "out")


def test_an_export_is_of_the_ema_weights(workspace, codec, tmp_path):
    run = awake(tmp_path / "run", codec, ClassLabel(10))
    checkpoint = teacher.read(teacher.newest(run))
    denoiser = teacher.load(run)[0]
    assert all(torch.equal(value, checkpoint["ema"][name]) for name, value in denoiser.state_dict().items())
    assert not torch.equal(denoiser.net.out.weight, checkpoint["state_dict"]["denoiser.net.out.weight"])
