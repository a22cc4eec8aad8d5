"""Networks (backbones): one file each. `Net` is what a denoiser and a configuration accept."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.time_input import TimeInput


class Net(nn.Module, ABC):
    """A backbone with inputs for the state, the time and a condition.

    Constructor arguments are kept as attributes.
    """

    time_input: TimeInput
    channels: int
    size: int

    @abstractmethod
    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the output y, shape (B, C, H, W) like x_t.

        Args:
            x_t: states, (B, C, H, W).
            time: time inputs, (B,).
            cond: what the condition returns.
        """
