"""Exported folders of every kind, in plain diffusers: the present versions and older ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import deploy.export
from deploy.export import export
from models.checkpoint import load_checkpoint
from models.diffusers.text import Prompts
from tests.deploy.text.plain_pipelines import ADAPTED_STEPS
from tests.deploy.text.students import sample_with_rectify, save_pretrained, save_student

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")
pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")

SCRIPT = Path(__file__).with_name("plain_pipelines.py")
# The python of a venv with diffusers 0.35, transformers 4.57 and peft.
OLDER = "RECTIFY_OLDER_DIFFUSERS"
RANK = {"sd": 2, "sdxl": 2, "sd3": 2, "pixart": 2, "flux": 2, "dit": 0, "unet": 0}
STEPS = dict.fromkeys(RANK, [1, 3, 6, 7, 30]) | {"flux": [3, 7]}  # its states are large
ADAPTED = [kind for kind, rank in RANK.items() if rank]


class Written(NamedTuple):
    """Exported folders, and what our sampler draws from their runs."""

    root: Path
    ours: dict[str, dict[int, Tensor]]  # images by kind and steps


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a student of every kind."""
    root = tmp_path_factory.mktemp("students")
    ours = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy.export, "PRETRAINED_STEPS", (1,))  # the others are compared below
        for kind, rank in RANK.items():
            folder = root / kind
            folder.mkdir()
            teacher = save_pretrained(kind, folder / "teacher")
            run = save_student(folder / "run", teacher, rank)
            export(run, folder / "out", steps=1)
            scheduler = DiffusionPipeline.from_pretrained(folder / "out").scheduler
            ours[kind] = sample_with_rectify(run, scheduler, ["zebra", "a cat"], STEPS[kind])
    (root / "jobs.json").write_text(json.dumps(STEPS))
    return Written(root, ours)


@pytest.fixture(scope="module", params=["present", "older"])
def theirs(request, written):
    """Return what plain diffusers draws from the folders, in one process."""
    python: Any = sys.executable
    if request.param == "older":
        python = os.environ.get(OLDER)
        if not python:
            pytest.skip(f"{OLDER} is not set: a python with diffusers 0.35 and transformers 4.57")
    result = written.root / f"{request.param}.pt"
    words = [python, "-P", SCRIPT, written.root, result]
    done = subprocess.run(words, cwd=written.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(result, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANK)
def test_plain_diffusers_draws_what_our_sampler_draws(written, theirs, kind):
    for steps, ours in written.ours[kind].items():
        gap = (theirs[kind][str(steps)] - ours).abs().max() / (ours.max() - ours.min())
        assert gap < 1e-4, f"{steps} steps: {gap}"
        assert (ours[0] - ours[1]).abs().max() > 1e-3, "the images are alike"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTED)
def test_a_teacher_with_the_adapters_alone_is_the_student(theirs, kind):
    merged = theirs[kind][str(ADAPTED_STEPS)]
    assert (theirs[kind]["adapters"] - merged).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", RANK)
def test_an_exported_folder_is_a_teacher_again(written, kind):
    out = written.root / kind / "out"
    scheduler = DiffusionPipeline.from_pretrained(out).scheduler
    again = sample_with_rectify(out, scheduler, ["zebra", "a cat"], [3])[3]
    torch.testing.assert_close(again, written.ours[kind][3], rtol=0, atol=1e-5)
    found, expected = (load_checkpoint(path).condition for path in (out, out.with_name("run")))
    assert not isinstance(expected, Prompts) or found.parts == expected.parts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("sd", ('base.load_lora_weights("out/lora")', "guides at 7.5", "DDIM or Euler")),
        ("sd3", ('base.load_lora_weights("out/lora")', "guides at 7,", "shift 1")),
        ("flux", ('base.load_lora_weights("out/lora")', "guides at 3.5", "shift 1")),
        ("pixart", ("import peft", "use_resolution_binning=False", "guides at 4.5")),
        ("dit", ("class_labels=[0, 1, 2]", "guides at 4,")),
        ("unet", ("pipe(num_inference_steps=1)",)),
    ],
)
def test_the_card_is_for_whoever_has_the_folder_alone(written, kind, parts):
    card = (written.root / kind / "out/README.md").read_text()
    for part in ("# out\n", 'from_pretrained("out")', "guidance (CFG) 1", *parts):
        assert part in card, part
    assert str(written.root) not in card
    if RANK[kind]:
        assert 'from_pretrained("teacher", scheduler=pipe.scheduler)' in card


CHECKED = ("tokenizer", "feature_extractor", "safety_checker")


def add_checkers(folder: Path) -> None:
    """Add to a pipeline's folder a checker of images that finds fault with every one."""
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)  # any cosine is larger
    checker.save_pretrained(folder / "safety_checker")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    settings = {"image_processor_type": "CLIPImageProcessor", **size}
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(settings))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))


def test_what_training_leaves_is_copied_byte_for_byte(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(deploy.export, "PRETRAINED_STEPS", (1,))
    caplog.set_level("INFO")
    teacher = save_pretrained("sd", tmp_path / "a teacher")
    add_checkers(teacher)
    weights = teacher / "text_encoder/model.safetensors"
    halved = {key: value.half() for key, value in load_file(weights).items()}
    weights.unlink()
    save_file(halved, teacher / "text_encoder/model.fp16.safetensors", {"format": "pt"})
    run = save_student(tmp_path / "run", teacher)
    teacher = teacher.rename(tmp_path / "moved")
    out = tmp_path / "out"
    export(run, out, steps=1)

    # Every file is the teacher's; weights that were a variant are read by default.
    for part in CHECKED:
        for file in (teacher / part).iterdir():
            assert (out / part / file.name).read_bytes() == file.read_bytes(), file
    copied = (out / "text_encoder/model.safetensors").read_bytes()
    assert copied == (teacher / "text_encoder/model.fp16.safetensors").read_bytes()
    expected, found = (
        json.loads((path / "model_index.json").read_text()) for path in (teacher, out)
    )
    for key in (*CHECKED, "text_encoder", "requires_safety_checker"):
        assert found[key] == expected[key], key

    # The checker works, though the images were compared without it.
    pipe = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    made = pipe("zebra", guidance_scale=1.0, num_inference_steps=1, output_type="np")
    assert made.nsfw_content_detected == [True]
    assert not made.images.any()

    # Another checker is another pipeline; an incomplete one is left out.
    shutil.copy(teacher / "model_index.json", run / "texts/safety_checker/notes.json")
    export(run, out, steps=1)
    assert [line for line in caplog.messages if "not the recorded safety_checker" in line]
    shutil.rmtree(run / "texts/feature_extractor")
    export(run, tmp_path / "unchecked", steps=1)
    lines = [line for line in caplog.messages if "is left out" in line]
    assert [name for name in CHECKED if any(name in line for line in lines)] == list(CHECKED[1:])
    assert not (tmp_path / "unchecked/safety_checker").exists()


def test_names_of_classes_are_kept(tmp_path, caplog):
    teacher = save_pretrained("dit", tmp_path / "teacher")
    index = json.loads((teacher / "model_index.json").read_text())
    names = {str(number): f"digit {number}, {number}" for number in range(10)}
    (teacher / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    run = save_student(tmp_path / "run", teacher)
    export(run, tmp_path / "out", steps=1)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids(["digit 7", "3"]) == [7, 3]

    # Without the teacher's folder they are unknown.
    shutil.rmtree(teacher)
    export(run, tmp_path / "unnamed", steps=1)
    assert [line for line in caplog.messages if str(teacher) in line and "names" in line]
    assert not DiffusionPipeline.from_pretrained(tmp_path / "unnamed").labels
