"""A tiny run, and what two runs must agree on bit for bit."""

import torch

from models import teacher

TINY = ("--model.denoiser.net.width", "16", "--model.denoiser.net.depth", "1", "--checkpoints.every", "5", "--metrics.every", "1")
CONFIG = "configs/digits/teacher.yaml"


def fit(out, steps=40, *more):
    """Return the words of a tiny training command."""
    return ("fit", "--config", CONFIG, "--out", out, "--trainer.max_steps", str(steps), *TINY, *more)


def final(run, steps=40):
    """Return weights, averages, optimizer and cost of a run's last checkpoint."""
    checkpoint = teacher.read(run / "checkpoints" / f"step={steps:09d}.ckpt")
    names = ("state_dict", "ema", "ema_profiles", "optimizer_states", "global_step", "evaluations")
    return {name: checkpoint[name] for name in names}


def equal(a, b):
    """Tell whether two nested values are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
