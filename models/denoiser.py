"""The denoiser: network + interpolant + prediction. Samplers and plain objectives see nothing else of a model."""

import torch
from torch import Tensor, nn

from models.clock import Clock, Scaled
from models.interpolant import Interpolant, seen
from models.prediction import Prediction


class Denoiser(nn.Module):
    """Estimates data and noise from a state: `denoiser(x_t, t, cond) -> (x_hat, eps_hat)`.

    A network may be built to read more: a second time s, and then `mix(x_hat, eps_hat, s)` is its jump from t to s (on Linear
    with Velocity the output is the mean velocity in between); a scale w, and then it gives what guidance at w would.

    Args:
        net: the network, called as net(x_t, clock(t), cond) -> y, shapes (B, C, H, W), (B,), as the condition gives.
        interpolant: alpha(t) and sigma(t) of the states.
        prediction: the row that the network's output y is.
        clock: what the network reads of t; by default the network's own `clock`, else t itself.
    """

    guidance: float | list[float] | None = None  # of the pairs that it was trained on, one scale or [low, high], if known
    averages: dict[str, Tensor] | None = None  # of its weights, by the names of its state_dict, in a run that keeps them (EMA)
    spent = 0  # network evaluations, one of one sample each, of all denoisers in this process so far: what methods cost

    def __init__(self, net: nn.Module, interpolant: Interpolant, prediction: Prediction, clock: Clock | None = None):
        super().__init__()
        self.net, self.interpolant, self.prediction = net, interpolant, prediction
        self.clock = clock or getattr(net, "clock", None) or Scaled(1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the states that the network was built for."""
        return self.net.channels, self.net.size, self.net.size  # type: ignore[return-value]

    @property
    def jumps(self) -> bool:
        """Whether the network reads a second time."""
        return bool(getattr(self.net, "jumps", False))

    @property
    def told_scale(self) -> bool:
        """Whether the network reads a scale of guidance."""
        return bool(getattr(self.net, "scaled", False))

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W), at least float32.

        Args:
            x_t: states, (B, C, H, W).
            t: their times in [0, 1], (B,) or ().
            cond: what the network is told.
            s: times to jump to, (B,) or (), for networks with `jumps`; t itself by default.
            w: scales of guidance, (B,) or (), for networks with `scaled`; 1 by default.

        Raises:
            ValueError: t lies outside [0, 1], or the prediction is singular there (looked at only where t is on the CPU); s or
                w are given to a network that does not read them.
        """
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        x_t, t = x_t.to(dtype), t.to(dtype).expand(len(x_t))
        if seen(t) and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t must lie in [0, 1] (0 is data, 1 is noise), got {t.min().item():.6g} to {t.max().item():.6g}")
        if (s is not None and not self.jumps) or (w is not None and not self.told_scale):
            raise ValueError("the network does not read a second time (build it with jumps) or a scale (with scaled)")
        more = {}
        if s is not None:
            more["until"] = self.clock(s.to(dtype).expand(len(x_t)))
        if w is not None:
            more["scale"] = w.to(dtype).expand(len(x_t))
        Denoiser.spent += len(x_t)
        y = self.net(self.prediction.read(self.interpolant, x_t, t), self.clock(t), cond, **more).to(dtype)
        return self.prediction.solve(self.interpolant, y, x_t, t)
