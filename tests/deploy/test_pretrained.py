"""Pipelines of diffusers as teachers; their students, whole or by adapters, go back to what plain diffusers and peft load."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from data.files import read_json
from data.pairs import PairSet
from deploy.cli import main
from models import teacher
from models.codec import Identity
from models.condition import ClassLabel, Unconditional
from models.denoiser import Denoiser
from models.interpolant import Discrete, Linear
from models.nets.pretrained import Pretrained
from models.pipeline import form
from models.prediction import Angular, Data, Noise, Velocity
from models.sampler import DDIM
from trainer.module import Generator

BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
PLAIN = """
import sys
import torch
from diffusers import DDIMPipeline
pipe = DDIMPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
images = pipe(3, num_inference_steps=4, output_type="np", generator=torch.manual_seed(7)).images
torch.save(torch.from_numpy(images), sys.argv[2])
"""


def unet(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    return UNet2DModel(**{**sizes, **BLOCKS, "layers_per_block": 1, **changes}).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline as others publish it: pixels of 16 x 16, DDPM, no classes."""
    path = tmp_path_factory.mktemp("published") / "ddpm"
    DDPMPipeline(unet(), DDPMScheduler(beta_end=0.004)).save_pretrained(path)
    return path


def test_a_pipeline_is_a_teacher_in_its_own_form(folder):
    denoiser, codec, condition = teacher.load(folder)
    assert repr(denoiser.interpolant) == repr(Discrete.linear(beta_end=0.004)) and isinstance(denoiser.prediction, Noise)
    assert isinstance(codec, Identity) and isinstance(condition, Unconditional) and denoiser.shape == (1, 16, 16)
    x_t, index = torch.randn(3, 1, 16, 16), torch.tensor([0, 400, 999])
    with torch.no_grad():
        eps_hat, theirs = denoiser(x_t, (index + 1) / 1000)[1], unet()(x_t, index).sample
    torch.testing.assert_close(eps_hat, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "interpolant", "prediction"),
    [
        (DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"),
         Discrete.scaled_linear(1000, 0.00085, 0.012), Angular),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"), Discrete.squaredcos_cap_v2(), Data),
        (DDIMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3), Discrete([0.1, 0.2, 0.3]), Noise),
        (DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
         Discrete.linear(zero_terminal_snr=True), Angular),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), Linear(), Velocity),
    ],
)  # fmt: skip
def test_the_form_is_the_schedulers(tmp_path, scheduler, interpolant, prediction):
    scheduler.save_pretrained(tmp_path)
    found, row, clock = form(tmp_path)
    assert repr(found) == repr(interpolant) and type(row) is prediction
    assert clock(torch.ones(1)).item() == (len(found.betas) - 1 if isinstance(found, Discrete) else 1000)


def test_an_export_of_ours_is_the_teacher_that_it_was(workspace):
    """Its network under diffusers' names says what ours does, told a class or none."""
    ours, theirs = (teacher.load(workspace.path / "runs/demo" / run) for run in ("student", "export"))
    x_t, t = torch.randn(4, 4, 8, 8), torch.tensor([0.1, 0.4, 0.9, 1.0])
    for told, label in ((torch.tensor([0, 3, 9, 5]), torch.tensor([0, 3, 9, 5])), (None, None)):
        for one, two in zip(ours[0](x_t, t, told), theirs[0](x_t, t, label)):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert theirs[2].classes == 1000 and theirs[1].weights() == ours[1].weights()


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "set"
    assert main(["collect", "--teacher", str(folder), "--out", str(path), "--pairs", "64", "--steps", "3"]) == 0
    return path


def student(tmp_path, folder, pairs, *words, lora=0):
    """Train a student for three steps; return its run."""
    init = {"denoiser": {"class_path": "models.pipeline.pretrained", "init_args": {"folder": str(folder), "lora": lora}}}
    config = {
        "model": {"class_path": "Generator", "init_args": {**init, "initial": str(folder)}},
        "data": {"source": {"class_path": "Pairs", "init_args": {"path": str(pairs)}}, "batch": 8},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": False, "callbacks": [{"class_path": "EMA", "init_args": {}}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *words]) == 0
    return tmp_path / "run"


def plainly(out, tmp_path):
    """Return what plain diffusers draws from a folder, in a process of its own."""
    subprocess.run([sys.executable, "-P", "-c", PLAIN, str(out), str(tmp_path / "theirs.pt")], check=True, cwd=tmp_path)
    return torch.load(tmp_path / "theirs.pt", weights_only=True).permute(0, 3, 1, 2)


def ours(run):
    denoiser, _, _ = teacher.load(run)
    eps = torch.randn(3, 1, 16, 16, generator=torch.manual_seed(7))
    return (DDIM(4).walk(denoiser, eps)[-1] / 2 + 0.5).clamp(0, 1)


def test_a_student_goes_back_to_plain_diffusers(folder, pairs, tmp_path):
    assert len(PairSet(pairs)) == 64
    run = student(tmp_path, folder, pairs)
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out"), "--steps", "5"]) == 0
    assert set(read_json(tmp_path / "out/export.json")["gaps"]) >= set("1245"), "the recommended number of steps, too"
    torch.testing.assert_close(plainly(tmp_path / "out", tmp_path), ours(run), rtol=0, atol=1e-4)
    assert (ours(run) - ours(folder)).abs().max() > 1e-3 and read_json(tmp_path / "out/export.json")["max_abs_diff"] < 1e-4
    assert not (tmp_path / "out/lora").exists()


def test_adapters_are_trained_alone_and_exported_merged_and_alone(folder, pairs, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
    run = student(tmp_path, folder, pairs, lora=4)
    trained, base = teacher.load(run)[0].net, Pretrained(str(folder / "unet"))
    state, theirs = trained.model.state_dict(), base.model.state_dict()
    kept = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    assert kept.keys() == theirs.keys() and all(torch.equal(kept[key], theirs[key]) for key in kept)
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    torch.testing.assert_close(plainly(tmp_path / "out", tmp_path), ours(run), rtol=0, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(UNet2DModel.from_pretrained(folder / "unet"), tmp_path / "out/lora").eval()
    merged = UNet2DModel.from_pretrained(tmp_path / "out/unet").eval()
    x, index = torch.randn(2, 1, 16, 16), torch.tensor([10, 900])
    with torch.no_grad():
        one, two, before = (net(x, index).sample for net in (adapted, merged, base.model))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (one - before).abs().max() > 1e-3


def test_adapters_at_zero_are_the_teacher(folder):
    pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
    base, adapted = Pretrained(str(folder / "unet")), Pretrained(str(folder / "unet"), lora=2)
    x, clock = torch.randn(2, 1, 16, 16), torch.tensor([3.0, 700.0])
    assert torch.equal(base(x, clock), adapted(x, clock))
    assert {name for name, value in adapted.named_parameters() if value.requires_grad} == {
        name for name, _ in adapted.named_parameters() if ".lora_" in name
    }
    again = teacher.build(teacher.describe(adapted))
    with torch.no_grad():
        [nn.init.normal_(value) for name, value in adapted.named_parameters() if ".lora_" in name]
    again.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(again(x, clock), adapted(x, clock))
    again = teacher.build(teacher.describe(adapted))
    again.load_state_dict(base.state_dict())
    torch.testing.assert_close(again(x, clock), base(x, clock))


def damaged(folder, tmp_path, file, text):
    shutil.copytree(folder, tmp_path / "bad")
    (tmp_path / "bad" / file).write_text(text)
    return str(tmp_path / "bad")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", "{", "not a readable index of a pipeline"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel; known here are"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "VQModel; known here are"),
        ("unet/config.json", {"sample_size": None}, "its sample_size is None"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "not a readable scheduler's folder (cosine"),
        ("unet/config.json", {"_class_name": "UNet3D"}, "is a UNet3D, Pretrained knows UNet2DModel, DiTTransformer2DModel"),
        ("unet/config.json", "[", "its config is not valid JSON"),
        ("unet/diffusion_pytorch_model.safetensors", "torn", "not a readable UNet2DModel"),
        ("scheduler/scheduler_config.json", {"prediction_type": "kind"}, "prediction_type kind and beta_schedule linear"),
        ("scheduler/scheduler_config.json", "x", "not a readable scheduler's folder"),
    ],
)
def test_what_is_no_teacher_is_one_line(folder, tmp_path, capfd, file, change, said):
    text = change if isinstance(change, str) else json.dumps({**json.loads((folder / file).read_text()), **change})
    path = damaged(folder, tmp_path, file, text)
    assert main(["collect", "--teacher", path, "--out", str(tmp_path / "x"), "--pairs", "8"]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("rectify: error: ") and said in lines[-1] and "Traceback" not in "".join(lines)


def test_networks_that_do_not_fit_are_refused(tmp_path):
    unet(out_channels=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="puts out 2 channels for 1"):
        Pretrained(str(tmp_path))
    unet(num_class_embeds=3).half().save_pretrained(tmp_path / "told")
    net = Pretrained(str(tmp_path / "told"))
    assert next(net.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="must be told a class"):
        net(torch.randn(2, 1, 16, 16), torch.ones(2))
    with pytest.raises(ValueError, match="model.condition.dropout"):
        Generator(Denoiser(net, Linear(), Velocity()), condition=ClassLabel(3, 0.1))


def test_only_the_classes_that_there_are_are_asked(workspace, tmp_path, capfd):
    """Our exported network knows 1,000 classes, of which the digits are ten."""
    words = ["collect", "--teacher", str(workspace.path / "runs/demo/export"), "--pairs", "24", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "pairs"), "--classes", "10"]) == 0
    pairs = PairSet(tmp_path / "pairs")
    assert [pairs[i]["condition"] for i in range(24)] == [i % 10 for i in range(24)] and pairs.manifest["asked"] == 10
    assert main([*words, "--out", str(tmp_path / "other"), "--classes", "1001"]) == 2
    assert "classes: 1001" in capfd.readouterr().err
