"""Networks (backbones): one file each. `Net` is what a denoiser and a configuration accept."""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from models.time_input import TimeInput


class Net(nn.Module, ABC):
    """A backbone with inputs for the state, the time and a condition.

    Constructor arguments are kept as attributes.
    """

    time_input: TimeInput
    channels: int
    size: int  # height and width
    size_multiple: int | None = None  # it takes heights and widths that are multiples; None: `size`
    classes: int | None = None  # None: it does not say
    tokens = 0  # of a text; 0: it takes no texts
    two_time = False  # whether it takes a second time
    guidance_embedded = False  # whether it takes a guidance scale
    needs_class = False  # whether it has no label for "no class"

    def list_blocks(self) -> list[nn.Module]:
        """Return the blocks: the units that are sharded, compiled and recomputed."""
        return []

    def null_condition(self, cond: Tensor) -> Tensor | None:
        """Return conditions of the shape of `cond` that mean none; None if there are no such."""
        return None

    @abstractmethod
    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the output y, shape (B, C, H, W) like x_t.

        Args:
            x_t: states, (B, C, H, W).
            time: time inputs, (B,).
            cond: what the condition returns.
        """


# What a denoiser uses of a network that has it. A `Net`, compiled or not, has all of it.


@runtime_checkable
class WithTimeInput(Protocol):
    """A network that says what it receives for t."""

    time_input: TimeInput


@runtime_checkable
class WithEndTime(Protocol):
    """A network that may take a second time."""

    two_time: bool


@runtime_checkable
class WithGuidance(Protocol):
    """A network that may take a guidance scale."""

    guidance_embedded: bool


@runtime_checkable
class WithNullCondition(Protocol):
    """A network, or a denoiser, that can say "no condition" by a condition."""

    def null_condition(self, cond: Tensor) -> Tensor | None:
        """Return conditions of the shape of `cond` that mean none; None if there are no such."""


@runtime_checkable
class WithShape(Protocol):
    """A network built for states of one shape."""

    channels: int
    size: int
