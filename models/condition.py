"""Conditions: what the network receives besides the state and the time."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Condition(ABC):
    """Turns a batch's raw conditions into the network's input, with dropout for guidance."""

    classes = 0  # class labels that it takes; 0 for none
    dropout = 0.0  # probability of dropping a sample's condition in training

    @abstractmethod
    def __call__(
        self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """Return the network's condition for raw conditions (B,).

        Args:
            raw: raw conditions, (B,).
            chance: returns uniform numbers (B,). Each sample's condition is dropped independently,
                with the condition's dropout probability. Without it (sampling) none is dropped.
        """

    def requested(self, indices: range) -> Tensor | None:
        """Return the raw conditions of samples by global index, (n,): all in turn, or None."""
        return None


class Unconditional(Condition):
    """The network receives no condition."""

    def __call__(
        self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        return None


class ClassLabel(Condition):
    """A class label; the label `classes` means "no class".

    Args:
        classes: number of classes.
        dropout: probability, in [0, 1], of dropping a sample's label in training, for
            classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).
    """

    def __init__(self, classes: int, dropout: float = 0.0):
        if not 0 <= dropout <= 1:
            raise ValueError(f"ClassLabel: dropout is {dropout}; it must lie in [0, 1]")
        self.classes = classes
        self.dropout = dropout

    def requested(self, indices: range) -> Tensor:
        return torch.tensor(indices) % self.classes

    def __call__(
        self, raw: Tensor | None, chance: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        if raw is None:
            raise ValueError("ClassLabel: the data has no class labels; use Unconditional")
        if chance is None or not self.dropout:
            return raw
        return raw.where(chance() >= self.dropout, self.classes)
