"""Training in the plane: a teacher, its pairs, and the student that is rectified on them."""

from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor

from data.batch import Batch
from data.noise import noise
from data.progress import Meter
from models.denoiser import Denoiser, count_evaluations
from models.interpolant import Interpolant, expand
from models.nets.mlp import MLP
from models.prediction import Prediction
from models.sampler import DDIM
from trainer.objectives import Matching
from trainer.objectives.parts.time_distributions import TimeDistribution, Uniform, UShaped
from trainer.step_random import StepRandom

BATCH = 256
PAIRS = 16384
FLOW_STEPS = 64  # of DDIM, which stand for the flow itself
LEARNING_RATE = 2e-3
SINGULAR_START = 0.98  # where sampling starts if the prediction is singular at t = 1


class Normalised(Prediction):
    """Another prediction with coefficients of unit length, and states divided by |(alpha, sigma)|.

    Everything that the network sees is then of order one. Without it the score on EDMPath spans
    1/80 to 500. EDM's preconditioning does the same for its own prediction (Karras et al. 2022,
    arXiv 2206.00364, table 1).

    Args:
        prediction: the other prediction.
    """

    def __init__(self, prediction: Prediction):
        self.prediction = prediction

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.prediction.coefficients(interpolant, t)
        length = torch.hypot(a, b)
        return a / length, b / length

    def scale_input(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t / expand(torch.hypot(*interpolant(t)), x_t)


def solvable_grid(denoiser: Denoiser, steps: int) -> list[float]:
    """Return equal steps from t = 1 to 0, or from .98 where the prediction is singular at t = 1."""
    zeros = torch.zeros(1, *denoiser.shape)
    first = 1.0
    try:
        denoiser.prediction.solve(denoiser.interpolant, zeros, zeros, torch.ones(1))
    except ValueError:
        first = SINGULAR_START
    return [first * (1 - i / steps) for i in range(steps + 1)]


def train(
    denoiser: Denoiser,
    x: Tensor,
    eps: Tensor | None,
    times: TimeDistribution,
    updates: int,
    seed: int,
    name: str,
    show: bool = True,
) -> Denoiser:
    """Train a denoiser, in place, with a learning rate that falls to zero; return it.

    Args:
        denoiser: to train.
        x: data, (N, C, H, W).
        eps: the data's noise, (N, C, H, W); None draws fresh noise.
        times: distribution of t.
        updates: of the weights.
        seed: of the random draws.
        name: for the progress line.
        show: whether progress is shown.
    """
    objective = Matching(times)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    with Meter(name, updates, "updates", shown=show) as meter:
        for step in range(updates):
            # a batch, coupled with its noise
            indices = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
            batch = Batch(x[indices], latent=True, seed=seed, step=step, size=BATCH)
            random = StepRandom(batch)
            batch_eps = random.noise(batch.x) if eps is None else eps[indices]
            # one update
            loss = objective(denoiser, batch.x, batch_eps, None, random).total
            if not loss.isfinite():
                raise FloatingPointError(
                    f"{name}: the loss is {loss.item()} at update {step}; "
                    "use another interpolant or prediction, or fewer steps"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            meter.add(1, f"loss {loss.item():.4f}")
    return denoiser.eval().requires_grad_(False)


class Evaluations(NamedTuple):
    """Network evaluations of a rectification."""

    teacher: int  # of its training
    student: int  # of the pairs and its training


class Rectification:
    """A teacher of a distribution, and a student that starts as the teacher and learns its pairs.

    Liu et al. 2022 (arXiv 2209.03003); Wang et al. 2024 (arXiv 2410.07303). `evaluations` are the
    network evaluations of both.

    Args:
        x: points of the distribution, (N, C, 1, 1).
        interpolant: of the states.
        prediction: of the network, normalised.
        updates: of each of the two trainings.
        seed: of the network, the training and the noise.
        show: whether the progress of the trainings is shown.
    """

    def __init__(
        self,
        x: Tensor,
        interpolant: Interpolant,
        prediction: Prediction,
        updates: int,
        seed: int,
        show: bool = True,
    ):
        self.seed = seed
        self.description = f"{interpolant!r}, {prediction!r}"
        # 1. the teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = MLP(channels=x.shape[1])
        teacher = Denoiser(net, interpolant, Normalised(prediction))
        with count_evaluations() as of_teacher:
            self.teacher = train(teacher, x, None, Uniform(), updates, seed, "before", show)
        with count_evaluations() as of_student:
            # 2. its pairs
            eps = self.noise(PAIRS, 0)
            sampler = DDIM(FLOW_STEPS, solvable_grid(self.teacher, FLOW_STEPS))
            samples = sampler(self.teacher, eps)
            # 3. the student
            student = deepcopy(self.teacher).train().requires_grad_(True)
            self.student = train(student, samples, eps, UShaped(), updates, seed, "after", show)
        self.evaluations = Evaluations(of_teacher.count, of_student.count)

    def noise(self, n: int, stream: int) -> Tensor:
        """Return n noises, (n, C, 1, 1), of a stream: 0 for the pairs, others for evaluation."""
        return noise(self.seed, stream, (n, *self.teacher.shape))
