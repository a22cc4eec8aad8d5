"""Stand-ins in tests of distillation: a teacher that is there, a denoiser that is watched, a student that is wrong."""

import torch

from tests.oracle import Flow


class Told:
    """A teacher that is there already."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def on(self, student, like):
        return self.denoiser


class Asked:
    """A denoiser that writes down what it is asked: t, s, and whether for a gradient."""

    jumps = True

    def __init__(self, denoiser):
        self.denoiser, self.interpolant, self.calls = denoiser, denoiser.interpolant, []

    def __call__(self, x_t, t, cond=None, s=None):
        self.calls.append((t, s, torch.is_grad_enabled()))
        return self.denoiser(x_t, t, cond, *(() if s is None else (s,)))


class Bent:
    """The exact jumps, each x_hat moved by a number: `by` where a gradient is asked for, `held` where none is."""

    jumps = True

    def __init__(self, interpolant, by, held):
        self.flow, self.interpolant, self.by, self.held = Flow(interpolant), interpolant, by, held

    def __call__(self, x_t, t, cond=None, s=None):
        x_hat, eps_hat = self.flow(x_t, t, cond, s)
        return x_hat + (self.by if torch.is_grad_enabled() else self.held), eps_hat


def coupled(n=64):
    """Return data and noise, n of each."""
    return torch.randn(2, n, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss(objective, denoiser, n=64):
    """Return the loss of an objective at times that are the same in every call."""
    torch.manual_seed(0)
    return objective(denoiser, *coupled(n))
