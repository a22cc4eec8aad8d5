"""Denoisers that jump, for tests of objectives that teach jumps."""

import torch

from models.interpolant import expand
from tests.oracle import Flow, Point
from trainer.objectives.meanflow import mean_velocity


class Straight(Point):
    """The exact denoiser of one point: it is its own jump, and every noise leads there. It counts what it is asked."""

    jumps, asked = True, 0

    def __call__(self, x_t, t, cond=None, s=None):
        self.asked += len(x_t)
        return super().__call__(x_t, t)


class Moved(Flow):
    """The exact jumps of a Gaussian, whose mean velocity is moved by theta; by `held` where no gradient is asked for."""

    theta, held = torch.zeros((), dtype=torch.float64), None

    def __call__(self, x_t, t, cond=None, s=None):
        theta = self.theta if torch.is_grad_enabled() or self.held is None else self.held
        x, eps = super().__call__(x_t, t, cond, s)
        a, b = mean_rows(self.interpolant, t, t if s is None else s)
        alpha, sigma = self.interpolant(t)
        part = expand(theta / (a * sigma - b * alpha), x)  # along (sigma, -alpha) x_t stays as it is
        return x + part * expand(sigma, x), eps - part * expand(alpha, x)


def mean_rows(interpolant, t, s):
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return mean_velocity(interpolant, (one, zero), t, s), mean_velocity(interpolant, (zero, one), t, s)
