"""Teachers that objectives ask without a run, and the exact student of windows."""

import torch

from models.prediction import Velocity
from models.windows import window


class Asked:
    """A frozen teacher that needs no run, and counts the states that it is asked about."""

    def __init__(self, denoiser):
        self.denoiser, self.interpolant, self.jumps, self.asked = denoiser, denoiser.interpolant, hasattr(denoiser, "map"), 0

    def on(self, student, like, interpolant=None):
        assert repr(interpolant or student.interpolant) == repr(self.interpolant)
        return self

    def __call__(self, x_t, t, cond=None, *jump):
        self.asked += len(x_t)
        return self.denoiser(x_t, t, cond, *jump)


class Taught:
    """What a student of the exact teacher has to answer: the ends of the chord that its state lies on, moved by `by`."""

    def __init__(self, interpolant, flow, edges, by=0.0, prediction=None):
        self.interpolant, self.flow, self.edges = interpolant, flow, edges
        self.by, self.prediction = torch.as_tensor(by), prediction or Velocity()

    def __call__(self, x_t, t, cond=None):
        s, e = window(t, self.edges)
        ends = []
        for value in (0.0, 1.0):  # all is affine in the state at the window's noisy end
            x_s = torch.full((len(t), 1, 1, 1), value, dtype=x_t.dtype)
            ends.append(self.flow.interpolant.unmix(x_s, s, self.flow.map(x_s, s, e), e))
        low, high = (self.interpolant.mix(*pair, t) for pair in ends)
        place = (x_t - low) / (high - low)
        x, eps = (a + place * (b - a) for a, b in zip(*ends))
        y = self.prediction.target(self.interpolant, x, eps, t) + self.by
        return self.prediction.solve(self.interpolant, y, x_t, t)
