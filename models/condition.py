"""Conditions: what the network is told beside the state."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Condition(ABC):
    """Turns a batch's raw conditions into what the network reads, with classifier-free dropout."""

    @abstractmethod
    def __call__(self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Return the network's condition of raw conditions (B,).

        `chance` draws uniform numbers (B,), by which each sample's condition is dropped on its own with the condition's
        dropout probability; without it (sampling) nothing is dropped.
        """

    def asked(self, indices: range) -> Tensor | None:
        """Return the raw conditions that are asked for at global indices, (n,): all there are in turn, or nothing."""
        return None


class Unconditional(Condition):
    """The network is told nothing."""

    def __call__(self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None) -> Tensor | None:
        return None


class ClassLabel(Condition):
    """The network is told a class; the label `classes` means "not told".

    Args:
        classes: number of classes.
        dropout: probability, in [0, 1], of hiding a sample's label in training (classifier-free guidance, 2207.12598).
    """

    def __init__(self, classes: int, dropout: float = 0.0):
        if not 0 <= dropout <= 1:
            raise ValueError(f"ClassLabel: dropout is {dropout}, it must lie in [0, 1]")
        self.classes, self.dropout = classes, dropout

    def asked(self, indices: range) -> Tensor:
        return torch.tensor(indices) % self.classes

    def __call__(self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None) -> Tensor | None:
        if raw is None:
            raise ValueError("ClassLabel: the data carries no class labels; use Unconditional")
        if chance is None or not self.dropout:
            return raw
        return raw.where(chance() >= self.dropout, self.classes)
