"""Training in the plane: a teacher, the pairs that it draws, and the student that is rectified on them."""

from copy import deepcopy

import torch
from torch import Tensor

from data.batch import Batch
from data.noise import noise
from data.progress import Meter
from models.denoiser import Denoiser
from models.interpolant import Interpolant, expand
from models.nets.mlp import MLP
from models.prediction import Prediction
from models.sampler import DDIM
from trainer.draws import Draws
from trainer.objectives import Matching
from trainer.times import Times, Uniform, UShaped

BATCH, PAIRS, FINE, RATE = 256, 16384, 64, 2e-3
BELOW = 0.98  # where a walk begins if the row is singular at t = 1


class Unit(Prediction):
    """Another row at unit length, shown the state over the length of (alpha, sigma): all that a network meets is of order one.

    Without it the score on Karras' interpolant spans 1/80 to 500. EDM does as much for its own row (2206.00364, table 1).

    Args:
        prediction: the other row.
    """

    def __init__(self, prediction: Prediction):
        self.prediction = prediction

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.prediction.row(interpolant, t)
        length = torch.hypot(a, b)
        return a / length, b / length

    def read(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / expand(torch.hypot(*interpolant(t)), x_t)


def grid(denoiser: Denoiser, steps: int) -> list[float]:
    """Return equal steps from t = 1 to 0, or from BELOW where the row is singular at t = 1 (Noise where alpha = 0)."""
    nothing, one = torch.zeros(1, *denoiser.shape), torch.ones(1)
    try:
        denoiser.prediction.solve(denoiser.interpolant, nothing, nothing, one)
        first = 1.0
    except ValueError:
        first = BELOW
    return [first * (1 - i / steps) for i in range(steps + 1)]


def train(
    denoiser: Denoiser, x: Tensor, eps: Tensor | None, times: Times, updates: int, seed: int, name: str, shown: bool = True
) -> Denoiser:
    """Train a denoiser, in place, on data x (N, C, H, W), fresh noise or their own, with a rate that falls to zero; return it."""
    objective = Matching(times)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    with Meter(name, updates, "updates", shown=shown) as meter:
        for step in range(updates):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
            batch = Batch(x[rows], latent=True, seed=seed, step=step, size=BATCH)
            draws = Draws(batch)
            loss = objective(denoiser, batch.x, draws.noise(batch.x) if eps is None else eps[rows], None, draws)
            if not loss.isfinite():
                raise FloatingPointError(f"{name}: the loss is {loss.item()} at update {step}; take another form or fewer steps")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            meter.add(1, f"loss {loss.item():.4f}")
    return denoiser.eval().requires_grad_(False)


class Rectification:
    """A teacher of a law, and a student that began as the teacher and was trained on its pairs (2209.03003, 2410.07303).

    `spent` counts the network evaluations of the teacher's training, and of the pairs with the student's training.

    Args:
        x: points of the law, (N, C, 1, 1).
        interpolant: of the states.
        prediction: the row that the network learns, at unit length.
        updates: of each of the two trainings.
        seed: of the network, the training and the noise.
        shown: whether the progress of the trainings is.
    """

    def __init__(self, x: Tensor, interpolant: Interpolant, prediction: Prediction, updates: int, seed: int, shown: bool = True):
        self.seed, self.form = seed, f"{interpolant!r}, {prediction!r}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = MLP(channels=x.shape[1])
        began = Denoiser.spent
        self.teacher = train(Denoiser(net, interpolant, Unit(prediction)), x, None, Uniform(), updates, seed, "before", shown)
        half = Denoiser.spent
        eps = self.noise(PAIRS, 0)
        drawn = DDIM(FINE, grid(self.teacher, FINE))(self.teacher, eps)
        student = deepcopy(self.teacher).train().requires_grad_(True)
        self.student = train(student, drawn, eps, UShaped(), updates, seed, "after", shown)
        self.spent = half - began, Denoiser.spent - half

    def noise(self, n: int, stream: int) -> Tensor:
        """Return n noises, (n, C, 1, 1), of a stream: 0 for the pairs, others for what is looked at."""
        return noise(self.seed, stream, (n, *self.teacher.shape))
