"""Images of exported folders, sampled by plain diffusers: python plain_pipelines.py FOLDER OUT.

FOLDER/KIND has teacher/ and out/, and FOLDER/jobs.json the numbers of steps by kind. It runs with
other versions of diffusers and transformers too, so it imports nothing of ours.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

ADAPTED_STEPS = 7


def sample(pipe: Any, steps: int) -> torch.Tensor:
    """Return two images of a pipeline, in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    kind = type(pipe).__name__
    settings: dict[str, Any] = {"generator": torch.manual_seed(7), "num_inference_steps": steps}
    if kind == "DDPMPipeline":
        settings["batch_size"] = 2
    else:
        settings["guidance_scale"] = 1.0
        name = "class_labels" if kind == "DiTPipeline" else "prompt"
        settings[name] = [1, 7] if kind == "DiTPipeline" else ["zebra", "a cat"]
    if kind.startswith("PixArt"):
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    images = pipe(**settings, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def sample_with_adapters(teacher: Path, out: Path, scheduler: Any) -> torch.Tensor:
    """Return two images of a teacher with exported adapters alone."""
    pipe = DiffusionPipeline.from_pretrained(teacher, scheduler=scheduler)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(out / "lora"))
    else:
        import peft

        pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, str(out / "lora"))
    return sample(pipe, ADAPTED_STEPS)


def main(root: Path, result: str) -> None:
    """Sample from every folder, and write all images as one file."""
    images: dict[str, dict[str, torch.Tensor]] = {}
    for kind, steps in json.loads((root / "jobs.json").read_text()).items():
        out = root / kind / "out"
        pipe = DiffusionPipeline.from_pretrained(out)
        images[kind] = {str(n): sample(pipe, n) for n in steps}
        if (out / "lora").is_dir():
            adapted = sample_with_adapters(root / kind / "teacher", out, pipe.scheduler)
            images[kind]["adapters"] = adapted
    torch.save(images, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
