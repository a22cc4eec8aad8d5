"""What training steps return to Lightning, which passes it to the callbacks."""

from typing import NamedTuple, NotRequired, TypedDict

from torch import Tensor


class PerSample(NamedTuple):
    """What is logged of each sample of a batch, (B,) each, without gradient."""

    times: Tensor
    distances: Tensor  # its error: their mean is the loss, or the named part of it


class StepOutputs(TypedDict):
    """The loss of a micro-batch, and what callbacks read; only the loss has a gradient.

    Attributes:
        loss: what is minimised. Callbacks receive it divided by the number of accumulated batches.
        parts: terms of the loss by name, the same names on all ranks.
        per_sample: of the batch's samples, if the loss is one of single samples.
        evaluations: network evaluations that the step took.
    """

    loss: Tensor
    parts: NotRequired[dict[str, Tensor]]
    per_sample: NotRequired[PerSample | None]
    evaluations: NotRequired[int]
