"""Schedules of the learning rate that torch does not have."""

from math import cos, pi
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Decay = Literal["constant", "cosine", "linear", "inverse_sqrt"]


class WarmUp(LRScheduler):
    """Raises the learning rate linearly over the first steps, then lets it decay to a floor.

    Step n of the warm-up, from 1, has n / warmup of the optimizer's learning rate. What follows is
    a function of the number of steps alone, so that a resumed run continues exactly.

    Args:
        optimizer: the optimizer.
        warmup: steps over which the rate rises; 0 begins with the whole rate.
        decay: what follows. "constant" keeps the rate. "cosine" (Loshchilov & Hutter 2017, arXiv
            1608.03983, eq. 5) and "linear" reach the floor after `steps` steps. "inverse_sqrt"
            falls as 1 / sqrt(step) (Vaswani et al. 2017, arXiv 1706.03762, eq. 3) and does not
            depend on `steps`.
        floor: the smallest rate, as a part of the optimizer's, in [0, 1].
        steps: steps of warm-up and decay together; by default trainer.max_steps. Afterwards the
            rate stays at the floor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: int = 0,
        decay: Decay = "cosine",
        floor: float = 0.0,
        steps: int | None = None,
    ):
        if warmup < 0 or not 0 <= floor <= 1:
            raise ValueError(
                f"WarmUp: warmup is {warmup}, and floor is {floor}; warmup must not be negative, "
                "floor must lie in [0, 1]"
            )
        if decay in ("cosine", "linear") and (steps is None or steps < 1):
            raise ValueError(f"WarmUp: steps is {steps}; a {decay} decay needs at least 1")
        self.warmup = warmup
        self.decay = decay
        self.floor = floor
        self.steps = steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of every group in the next step."""
        factor = self.factor(self.last_epoch)
        return [rate * factor for rate in self.base_lrs]

    def factor(self, done: int) -> float:
        """Return the next step's part of the optimizer's learning rate.

        Args:
            done: number of steps before it.
        """
        if done < self.warmup:
            return (done + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        if self.decay == "inverse_sqrt":
            return max(self.floor, (max(1, self.warmup) / (done + 1)) ** 0.5)

        # a decay that ends: how much of it is over
        assert self.steps is not None
        length = max(1, self.steps - self.warmup)
        progress = min(1.0, (done - self.warmup) / length)
        remaining = 1 - progress
        if self.decay == "cosine":
            remaining = (1 + cos(pi * progress)) / 2
        return self.floor + (1 - self.floor) * remaining
