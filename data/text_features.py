"""Text features: what a text encoder makes of captions."""

from typing import NamedTuple

import torch
from torch import Tensor


class TextFeatures(NamedTuple):
    """Embeddings of B texts, of all their tokens, of the whole texts, or both."""

    tokens: Tensor | None = None  # (B, L, D) float32; zero where the mask is False
    mask: Tensor | None = None  # (B, L) bool: True for tokens of the text
    pooled: Tensor | None = None  # (B, E) float32

    def to(self, device: torch.device, non_blocking: bool = False) -> "TextFeatures":
        """Return the features on a device."""
        moved = []
        for value in self:
            if value is not None:
                value = value.to(device, non_blocking=non_blocking)
            moved.append(value)
        return TextFeatures(*moved)
