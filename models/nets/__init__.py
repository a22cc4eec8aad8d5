"""Networks (backbones): one file each; `Net` is what a denoiser and a configuration accept."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.clock import Clock


class Net(nn.Module, ABC):
    """A backbone that reads a state, its own clock and a condition. Constructor arguments are kept as attributes."""

    clock: Clock
    channels: int
    size: int

    @abstractmethod
    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the output y, shape (B, C, H, W) as x_t, for clock readings (B,) and what the condition gives."""
