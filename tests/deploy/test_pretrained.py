"""Pipelines of diffusers as teachers; plain diffusers and peft load the students made from them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import nn

from data.files import read_json
from data.pairs import PairSet
from deploy.export import Origin, compare_images, read_licence, read_origin, write_pipeline
from models.checkpoint import load_checkpoint
from models.codec import Identity
from models.condition import ClassLabel, Unconditional
from models.denoiser import Denoiser
from models.description import build, describe
from models.diffusers.networks import Pretrained
from models.diffusers.scheduler import read_scheduler
from models.interpolant import Discrete, Linear
from models.prediction import Data, NoisePrediction, Velocity, VPrediction
from models.sampler import DDIM
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import spec, train
from trainer.module import Generator

NEEDS_PEFT = "needs peft: pip install 'rectify[lora]'"
PLAIN = """
import sys
import torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
generator = torch.manual_seed(7)
images = pipe(3, num_inference_steps=4, output_type="np", generator=generator).images
torch.save(torch.from_numpy(images), sys.argv[2])
"""


def small_unet(**changes: Any) -> UNet2DModel:
    """Return a network for pixels of 1 x 16 x 16, with random weights."""
    sizes = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    return UNet2DModel(**{**sizes, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a published pipeline: pixels of 16 x 16, DDPM, no classes."""
    path = tmp_path_factory.mktemp("published") / "ddpm"
    DDPMPipeline(small_unet(), DDPMScheduler(beta_end=0.004)).save_pretrained(path)
    return path


def test_a_pipeline_is_loaded_with_its_interpolant_and_prediction(folder):
    denoiser, codec, condition = load_checkpoint(folder)
    assert repr(denoiser.interpolant) == repr(Discrete.linear(beta_end=0.004))
    assert isinstance(denoiser.prediction, NoisePrediction)
    assert denoiser.shape == (1, 16, 16)
    assert isinstance(codec, Identity)
    assert isinstance(condition, Unconditional)


def test_a_pipelines_denoiser_gives_its_networks_noise(folder):
    denoiser = load_checkpoint(folder)[0]
    x_t = torch.randn(3, 1, 16, 16)
    index = torch.tensor([0, 400, 999])
    with torch.no_grad():
        eps_hat = denoiser(x_t, (index + 1) / 1000)[1]
        theirs = small_unet()(x_t, index).sample
    torch.testing.assert_close(eps_hat, theirs, rtol=1e-4, atol=1e-5)


V_SCALED = DDIMScheduler(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
)
DATA_COSINE = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
TRAINED_BETAS = DDIMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
ZERO_SNR = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(
    ("scheduler", "interpolant", "prediction", "last"),
    [
        (V_SCALED, Discrete.scaled_linear(1000, 0.00085, 0.012), VPrediction, 999),
        (DATA_COSINE, Discrete.squaredcos_cap_v2(), Data, 999),
        (TRAINED_BETAS, Discrete([0.1, 0.2, 0.3]), NoisePrediction, 2),
        (ZERO_SNR, Discrete.linear(zero_terminal_snr=True), VPrediction, 999),
        (FLOW, Linear(), Velocity, 1000),
    ],
    ids=["v, scaled linear", "data, cosine", "trained betas", "zero terminal SNR", "flow"],
)
def test_a_scheduler_gives_interpolant_prediction_and_time(
    tmp_path, scheduler, interpolant, prediction, last
):
    scheduler.save_pretrained(tmp_path)
    found, found_prediction, time_input = read_scheduler(tmp_path)
    assert repr(found) == repr(interpolant)
    assert type(found_prediction) is prediction
    assert time_input(torch.ones(1)).item() == last


@pytest.mark.parametrize("labels", [torch.tensor([0, 3, 9, 5]), None], ids=["labels", "none"])
def test_our_published_folder_is_the_denoiser_that_it_was_made_from(workspace, labels):
    """The network under diffusers' names gives what ours gives."""
    ours, theirs = (
        load_checkpoint(workspace.path / "runs/demo" / run) for run in ("student", "export")
    )
    x_t = torch.randn(4, 4, 8, 8)
    t = torch.tensor([0.1, 0.4, 0.9, 1.0])
    for expected, found in zip(ours[0](x_t, t, labels), theirs[0](x_t, t, labels), strict=True):
        torch.testing.assert_close(expected, found, rtol=1e-4, atol=1e-4)
    assert theirs[2].classes == 1000
    assert theirs[1].weights() == ours[1].weights()


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    """Return 64 pairs of the published pipeline."""
    path = tmp_path_factory.mktemp("pairs") / "set"
    succeed("collect", "--teacher", folder, "--out", path, "--pairs", "64", "--steps", "3")
    return path


def train_student(run: Path, folder: Path, pairs: Path, lora: int = 0) -> Path:
    """Train a student of the pipeline for three steps; return its run."""
    denoiser = spec("models.diffusers.pipeline.pretrained", folder=str(folder), lora=lora)
    config = {
        "model": spec("Generator", denoiser=denoiser, initial=str(folder)),
        "data": {"source": spec("Pairs", path=str(pairs)), "batch": 8},
        "optimizer": spec("AdamW", lr=0.01),
        "trainer": {"accelerator": "cpu", "logger": False, "callbacks": [spec("EMA")]},
    }
    return train(config, run, steps=3)


def sample_with_diffusers(out: Path, folder: Path) -> torch.Tensor:
    """Return what plain diffusers samples from an exported folder, in a separate process."""
    words = [sys.executable, "-P", "-c", PLAIN, str(out), str(folder / "theirs.pt")]
    subprocess.run(words, check=True, cwd=folder)
    return torch.load(folder / "theirs.pt", weights_only=True).permute(0, 3, 1, 2)


def sample_with_rectify(run: Path) -> torch.Tensor:
    """Return what our DDIM samples from a run or a pipeline, from the same noise."""
    denoiser, _, _ = load_checkpoint(run)
    eps = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(7))
    return (DDIM(4).integrate(denoiser, eps)[-1] / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def student(folder, pairs, tmp_path_factory):
    """Return the run of a student, and its exported folder."""
    path = tmp_path_factory.mktemp("student")
    run = train_student(path / "run", folder, pairs)
    succeed("export", "--run", run, "--out", path / "out", "--steps", "5")
    return run, path / "out"


def test_a_student_is_sampled_by_plain_diffusers(folder, student, tmp_path):
    run, out = student
    torch.testing.assert_close(
        sample_with_diffusers(out, tmp_path), sample_with_rectify(run), rtol=0, atol=1e-4
    )
    assert (sample_with_rectify(run) - sample_with_rectify(folder)).abs().max() > 1e-3
    assert not (out / "lora").exists()


def test_a_students_folder_records_its_gaps_at_the_recommended_steps_too(student):
    record = read_json(student[1] / "export.json")
    assert set(record["gaps"]) >= {"1", "2", "4", "5"}
    assert record["max_abs_diff"] < 1e-4


def sample_by_formula(out: Path, steps: int) -> torch.Tensor:
    """Return what DDIM's formula gives on trailing timesteps (arXiv 2010.02502, eq. 12)."""
    net = UNet2DModel.from_pretrained(out / "unet").eval()
    alphas_cumprod = torch.tensor(Discrete.linear(beta_end=0.004).betas).neg().add(1).cumprod(0)
    indices = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
    x = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(7))
    for i, index in enumerate(indices):
        with torch.no_grad():
            noise = net(x, index).sample
        now = alphas_cumprod[index]
        later = alphas_cumprod[indices[i + 1]] if i + 1 < steps else torch.ones(())
        x_hat = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = later.sqrt() * x_hat + (1 - later).sqrt() * noise
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("steps", [3, 6, 7, 30])
def test_the_exported_scheduler_makes_any_number_of_steps(student, steps):
    _, out = student
    pipe = DDPMPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(7)
    images = pipe(3, generator, num_inference_steps=steps, output_type="np").images
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, sample_by_formula(out, steps), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("steps", "named"), [(61, 62), (1001, 1000)])
def test_numbers_of_steps_that_diffusers_does_not_make_are_refused(
    student, tmp_path, capfd, steps, named
):
    words = ("export", "--run", student[0], "--out", tmp_path / "x", "--steps", steps)
    assert_refused(capfd, words, "steps", steps, named)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["V_SCALED", "ZERO_SNR", "DATA_COSINE"])
def test_chains_of_all_kinds_are_exported(tmp_path, name):
    teacher = tmp_path / "teacher"
    DDIMPipeline(small_unet(), globals()[name]).save_pretrained(teacher)
    model = load_checkpoint(teacher)
    write_pipeline(tmp_path / "out", model)
    for gap in compare_images(tmp_path / "out", model, steps=7).values():
        assert gap.same_grid < 1e-5

    # The folder is a teacher again.
    interpolant, prediction, _ = read_scheduler(tmp_path / "out/scheduler")
    assert type(prediction) is type(model.denoiser.prediction)
    t = torch.tensor([0.001, 0.5, 0.999, 1.0], dtype=torch.float64)
    expected = torch.stack(model.denoiser.interpolant(t))
    torch.testing.assert_close(torch.stack(interpolant(t)), expected, rtol=1e-6, atol=1e-6)


def test_the_card_states_name_settings_and_what_is_unknown(student):
    _, header, text = (student[1] / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
    }
    for part in ("# out\n", 'from_pretrained("out")', "num_inference_steps=5", "sgm_uniform"):
        assert part in text, part
    assert "licence" in text


@pytest.mark.parametrize(
    ("folder_name", "source", "base_model"),
    [
        ("teacher", "org/name", "org/name"),
        ("models--org--name/snapshots/1a2b", "", "org/name"),
        ("teacher", "/home/me/models/teacher", ""),
    ],
    ids=["named in the index", "in the cache of the hub", "a folder"],
)
def test_the_card_has_its_teachers_name_and_licence(tmp_path, folder_name, source, base_model):
    # A run, and its teacher.
    teacher = tmp_path / folder_name
    teacher.mkdir(parents=True)
    (teacher / "model_index.json").write_text(json.dumps({"_name_or_path": source}))
    (teacher / "README.md").write_text("---\nlicense: openrail++\ntags: [a]\n---\n# Teacher\n")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/step=000000001.ckpt").touch()
    denoiser = spec("models.diffusers.pipeline.pretrained", folder=str(teacher))
    config = {"model": spec("Generator", denoiser=denoiser)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))

    found = read_origin(run)
    assert found.base_model == base_model
    assert found.licence == {"license": "openrail++"}
    assert found.teacher == str(teacher)
    shutil.rmtree(teacher)
    assert read_origin(run) == Origin(str(teacher))


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", ["mit", "gpl"]),
        ("---\nlicense: null\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\nlicense\n---\n", None),
        ("license: mit", None),
    ],
    ids=["Windows", "two", "null", "not YAML", "no mapping", "no header"],
)
def test_a_licence_is_read_from_any_card(tmp_path, text, licence):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_licence(tmp_path / "README.md").get("license") == licence


def test_all_samples_are_stored(pairs):
    assert len(PairSet(pairs)) == 64


@pytest.fixture(scope="module")
def adapted_student(folder, pairs, tmp_path_factory):
    """Return the run of a student of which only adapters were trained, and its exported folder."""
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    path = tmp_path_factory.mktemp("adapted")
    run = train_student(path / "run", folder, pairs, lora=4)
    succeed("export", "--run", run, "--out", path / "out", "--steps", "1")
    return run, path / "out"


def test_adapters_leave_the_teachers_weights(folder, adapted_student):
    trained = load_checkpoint(adapted_student[0])[0].net.model.state_dict()
    original = Pretrained(str(folder / "unet")).model.state_dict()
    frozen = {
        key.replace(".base_layer.", "."): value
        for key, value in trained.items()
        if ".lora_" not in key
    }
    assert frozen.keys() == original.keys()
    assert all(torch.equal(frozen[key], original[key]) for key in original)


def test_merged_adapters_are_sampled_by_plain_diffusers(adapted_student, tmp_path):
    run, out = adapted_student
    torch.testing.assert_close(
        sample_with_diffusers(out, tmp_path), sample_with_rectify(run), rtol=0, atol=1e-4
    )


def test_adapters_alone_are_loaded_by_peft(folder, adapted_student):
    import peft

    _, out = adapted_student
    original = UNet2DModel.from_pretrained(folder / "unet").eval()
    merged = UNet2DModel.from_pretrained(out / "unet").eval()
    base = UNet2DModel.from_pretrained(folder / "unet")
    adapted = peft.PeftModel.from_pretrained(base, out / "lora").eval()
    x = torch.randn(2, 1, 16, 16)
    index = torch.tensor([10, 900])
    with torch.no_grad():
        before, expected, found = (net(x, index).sample for net in (original, merged, adapted))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3


@pytest.fixture
def base(folder):
    """Return the pipeline's network."""
    return Pretrained(str(folder / "unet"))


@pytest.fixture
def adapted(folder):
    """Return the pipeline's network with new adapters."""
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    return Pretrained(str(folder / "unet"), lora=2)


INPUTS = (torch.randn(2, 1, 16, 16), torch.tensor([3.0, 700.0]))


def test_new_adapters_change_nothing(base, adapted):
    assert torch.equal(base(*INPUTS), adapted(*INPUTS))


def test_only_adapters_are_trained(adapted):
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert trained == [name for name, _ in adapted.named_parameters() if ".lora_" in name]


def test_an_adapted_network_is_rebuilt_from_its_description(adapted):
    again = build(describe(adapted))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(value)
    again.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(again(*INPUTS), adapted(*INPUTS))


def test_an_adapted_network_loads_weights_without_adapters(base, adapted):
    again = build(describe(adapted))
    again.load_state_dict(base.state_dict())
    torch.testing.assert_close(again(*INPUTS), base(*INPUTS))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("model_index.json", "{", ("model_index.json",)),
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            ("bad", "UNet2DConditionModel"),
        ),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, ("bad", "VQModel")),
        ("unet/config.json", {"sample_size": None}, ("unet", "sample_size", "None")),
        (
            "unet/config.json",
            {"_class_name": "UNet3D"},
            ("unet", "UNet3D", "UNet2DModel"),
        ),
        ("unet/config.json", "[", ("unet", "config")),
        ("unet/diffusion_pytorch_model.safetensors", "torn", ("unet", "UNet2DModel")),
        (
            "scheduler/scheduler_config.json",
            {"beta_schedule": "cosine"},
            ("bad/scheduler", "cosine"),
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "kind"},
            ("bad/scheduler", "prediction_type", "kind", "beta_schedule", "linear"),
        ),
        ("scheduler/scheduler_config.json", "x", ("bad/scheduler",)),
    ],
    ids=[
        *("torn index", "network of texts", "unknown codec", "no size", "unknown network"),
        *("torn config", "torn weights", "unknown betas", "unknown prediction", "torn scheduler"),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused(folder, tmp_path, capfd, file, change, named):
    bad = shutil.copytree(folder, tmp_path / "bad")
    text = change
    if isinstance(change, dict):
        text = json.dumps({**json.loads((folder / file).read_text()), **change})
    (bad / file).write_text(text)
    words = ("collect", "--teacher", bad, "--out", tmp_path / "x", "--pairs", "8")
    assert_refused(capfd, words, *named)


def test_a_network_with_other_channels_out_than_in_is_refused(tmp_path):
    small_unet(out_channels=2).save_pretrained(tmp_path)
    with refused(tmp_path, 2, 1):
        Pretrained(str(tmp_path))


@pytest.fixture
def labelled_net(tmp_path):
    """Return a network of three classes, stored in float16."""
    small_unet(num_class_embeds=3).half().save_pretrained(tmp_path)
    return Pretrained(str(tmp_path))


def test_weights_stored_in_float16_are_loaded_in_float32(labelled_net):
    assert next(labelled_net.parameters()).dtype == torch.float32


def test_a_unet_with_classes_needs_a_class(labelled_net):
    with refused("Pretrained", "UNet2DModel", "class"):
        labelled_net(torch.randn(2, 1, 16, 16), torch.ones(2))


def test_a_unet_with_classes_has_no_dropout_of_labels(labelled_net):
    denoiser = Denoiser(labelled_net, Linear(), Velocity())
    with refused("model.condition.dropout", 0):
        Generator(denoiser, condition=ClassLabel(3, 0.1))


@pytest.fixture
def thousand_classes(workspace):
    """Return a command that collects from our exported network.

    It has 1,000 classes, ten of which are the digits.
    """
    export = workspace.path / "runs/demo/export"
    return ("collect", "--teacher", export, "--pairs", "24", "--steps", "1")


def test_the_number_of_classes_may_be_lowered(thousand_classes, tmp_path):
    succeed(*thousand_classes, "--out", tmp_path / "pairs", "--classes", "10")
    pairs = PairSet(tmp_path / "pairs")
    assert [pairs[i]["condition"] for i in range(24)] == [i % 10 for i in range(24)]
    assert pairs.manifest["requested_classes"] == 10


def test_more_classes_than_the_network_has_are_refused(thousand_classes, tmp_path, capfd):
    words = (*thousand_classes, "--out", tmp_path / "pairs", "--classes", "1001")
    assert_refused(capfd, words, "classes", 1001, 1000)
