"""Conditions by sample index, and their encoding for the network."""

import torch
from torch import Tensor

from models.condition import Condition


def requested_conditions(
    condition: Condition, indices: range, classes: int | None = None
) -> Tensor | None:
    """Return the raw conditions of samples, (n,): class numbers or prompt numbers, in turn.

    Args:
        condition: the model's condition.
        indices: global indices of the samples.
        classes: use only the first `classes` classes.

    Returns:
        None for an unconditional model.
    """
    if classes:
        return torch.tensor(indices) % classes
    return condition.requested(indices)


def encode_condition(
    condition: Condition, raw: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return raw conditions (n,) as the network reads them, (n, ...), on a device.

    Texts are encoded on that device, too.
    """
    if raw is None:
        return condition(None)
    return condition(raw.to(device))
