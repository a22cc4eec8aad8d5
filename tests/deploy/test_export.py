"""The exported folder: in a fresh process, plain diffusers draws from it what our sampler draws."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deploy.export
from data.files import canonical, digest, read_json
from deploy.export import DIT_STEPS, export
from models.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint
from models.codec import KL, load_codec, save_codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.diffusers.scheduler import flow_scheduler, on_scheduler_grid
from models.guidance import Guided
from models.interpolant import Linear, VariancePreserving
from models.nets.dit import DiT
from models.prediction import NoisePrediction, Velocity
from tests.helpers.refusals import refused
from tests.helpers.teachers import save_teacher

LABELS = [0, 3, 9, 9]
SCALES = (1.0, 3.0)
PLAIN = f"""
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not {{"models", "data", "trainer", "deploy"}} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
images = {{}}
for steps in {DIT_STEPS}:
    for scale in {SCALES}:
        settings = {{"guidance_scale": scale, "num_inference_steps": steps, "output_type": "pt"}}
        found = pipe({LABELS}, generator=torch.manual_seed(5), **settings).images
        images[f"{{steps}} {{scale}}"] = found
torch.save(images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def codec(workspace):
    """Return the demo's autoencoder."""
    return load_codec(workspace.path / "runs/demo/latents/codec")


def small_run(
    run: Path,
    codec: KL,
    condition: Condition,
    interpolant: Any = None,
    prediction: Any = None,
    classes: int = 10,
) -> Path:
    """Write a run in which every weight of the network matters, and the EMA is not the raw weights.

    (DiT's adaLN-zero starts at zero, and its blocks would not matter.)
    """
    torch.manual_seed(0)
    net = DiT(size=8, channels=4, patch=2, width=32, depth=2, heads=4, classes=classes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    denoiser = Denoiser(net, interpolant or Linear(), prediction or Velocity())
    return save_teacher(run, denoiser, condition, codec, averaged=True)


@pytest.fixture(scope="module")
def labelled_run(codec, tmp_path_factory):
    """Return a run with ten classes."""
    return small_run(tmp_path_factory.mktemp("labelled") / "run", codec, ClassLabel(10))


def sample_with_diffusers(out: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what plain diffusers draws from an exported folder, by steps and guidance scale."""
    (folder / "plain.py").write_text(PLAIN)
    words = [sys.executable, "plain.py", str(out), "theirs.pt"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    return torch.load(folder / "theirs.pt", weights_only=True)


def sample_with_rectify(loaded: tuple[Any, Any, Any], steps: int, scale: float) -> torch.Tensor:
    """Return the images that our sampler draws on the grid of diffusers."""
    denoiser, vae, condition = loaded
    eps = torch.randn(4, *denoiser.shape, generator=torch.manual_seed(5))
    sampler, timed = on_scheduler_grid(flow_scheduler(), denoiser, steps)
    x = sampler.integrate(Guided(timed, scale), eps, condition(torch.tensor(LABELS)))[-1]
    return (vae.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("condition", "classes"),
    [(ClassLabel(10), 10), (Unconditional(), 0)],
    ids=["labels", "unconditional"],
)
def test_plain_diffusers_draws_the_same_images(codec, tmp_path, condition, classes):
    run = small_run(tmp_path / "run", codec, condition, classes=classes)
    export(run, tmp_path / "out", steps=1)
    theirs = sample_with_diffusers(tmp_path / "out", tmp_path)
    loaded = load_checkpoint(run)
    for steps in DIT_STEPS:
        for scale in SCALES:
            ours = sample_with_rectify(loaded, steps, scale)
            gap = (theirs[f"{steps} {scale}"] - ours).abs().max().item()
            assert gap <= 1e-4, f"{steps} steps, guidance {scale}: {gap}"
    difference = theirs["4 1.0"][0] - theirs["4 1.0"][1]
    assert difference.abs().max() > 1e-3, "all images are alike, so the comparison shows nothing"


@pytest.fixture(scope="module")
def written(labelled_run):
    """Return the exported folder of a run, whose card recommends two steps."""
    out = labelled_run.parent / "out"
    export(labelled_run, out, steps=2)
    return out


def test_the_folder_is_complete_and_holds_no_code(written):
    paths = [path for path in written.rglob("*") if path.is_file()]
    files = {path.relative_to(written).as_posix() for path in paths}
    scheduler = "scheduler/scheduler_config.json"
    assert {"model_index.json", "README.md", "export.json", scheduler} <= files
    assert all(name.endswith((".json", ".md", ".safetensors")) for name in files)


def test_the_card_recommends_steps_and_scale(written):
    card = (written / "README.md").read_text()
    assert "guidance_scale=1 " in card
    assert "num_inference_steps=2" in card


def test_the_scheduler_is_the_euler_method_of_a_flow(written):
    config = json.loads((written / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "flow_prediction"
    assert config["use_flow_sigmas"]
    assert config["solver_order"] == 1


def test_the_gaps_to_our_images_are_recorded(written):
    gaps = read_json(written / "export.json")["gaps"]
    assert set(gaps) == {str(steps) for steps in DIT_STEPS}
    assert all(gap["native_grid"] > gap["same_grid"] for gap in gaps.values())


def test_an_interpolant_that_diffusers_has_not_is_refused(codec, tmp_path):
    interpolant = VariancePreserving()
    run = small_run(tmp_path / "run", codec, ClassLabel(10), interpolant, NoisePrediction())
    found = ("VariancePreserving(beta_min=0.1, beta_max=20.0)", "NoisePrediction()")
    with refused(run, *found, "Linear()", "Velocity()"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_classes_than_the_pipeline_has_are_refused(codec, tmp_path):
    run = small_run(tmp_path / "run", codec, ClassLabel(1200), classes=1200)
    with refused("classes", 1200, "DiTPipeline", 1000):
        export(run, tmp_path / "out")


def test_an_export_is_kept_until_a_part_of_it_changes(codec, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(deploy.export, "DIT_STEPS", (1,))
    caplog.set_level("INFO")
    run = small_run(tmp_path / "a run", codec, ClassLabel(10))
    out = tmp_path / "an export"
    export(run, out, steps=1)
    before = read_json(out / "export.json")
    assert before["parts"] == {"vae": digest(canonical(codec.identity()))}
    export(run, out, steps=1)
    assert caplog.messages[-1] == f"{out} is finished"

    # The same network with another scale of latents is another pipeline.
    vae = load_codec(run).vae
    vae.register_to_config(scaling_factor=0.5)
    save_codec(vae, run / "codec")
    export(run, out, steps=1)
    assert [line for line in caplog.messages if f"{out}: not the recorded vae" in line]
    after = read_json(out / "export.json")
    assert after["parts"] != before["parts"]
    assert after["denoiser"] == before["denoiser"]
    assert json.loads((out / "vae/config.json").read_text())["scaling_factor"] == 0.5


def test_no_steps_are_refused(labelled_run, tmp_path):
    with refused("steps", 0):
        export(labelled_run, tmp_path / "out", steps=0)


def test_a_damaged_record_is_refused_until_its_folder_is_deleted(labelled_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("{")
    with refused(out / "export.json", f"delete {out}"):
        export(labelled_run, out, steps=1)


def test_an_export_does_not_replace_what_it_is_made_of(written, tmp_path):
    with refused(written, "--out"):
        export(written, written)
    (tmp_path / "file").write_text("mine")
    with refused(tmp_path, "--out"):
        export(written, tmp_path)


def test_the_loaded_weights_are_the_averaged_ones(labelled_run):
    file = read_checkpoint(newest_checkpoint(labelled_run))
    denoiser = load_checkpoint(labelled_run)[0]
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, file["ema"][name]), name
    raw = file["state_dict"]["denoiser.net.out.weight"]
    assert not torch.equal(denoiser.net.out.weight, raw)
