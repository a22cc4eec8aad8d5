"""Conditions of several parts, packed into one vector for each sample.

A class label is a number. Texts and vectors are more: their parts lie one after another in a
vector, so that samplers, guidance, objectives and pairs handle every condition as one tensor.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConditionParts:
    """The parts of the conditions of B samples. A part that the layout lacks is None.

    Attributes:
        label: class labels, (B,) int64; the number of classes means none.
        tokens: embeddings of the tokens of texts, (B, L, D).
        mask: which of them are tokens of the text, (B, L) bool.
        pooled: embeddings of whole texts, (B, E).
        has_text: whether there is a text, (B,) bool. Without one `tokens`, `mask` and `pooled` are
            zero.
        vector: other embeddings, (B, V).
        has_vector: whether there is one, (B,) bool. Without one `vector` is zero.
    """

    label: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    has_text: Tensor | None = None
    vector: Tensor | None = None
    has_vector: Tensor | None = None


@dataclass(frozen=True)
class ConditionLayout:
    """Which parts a condition has, and where they lie in its vector.

    Attributes:
        classes: class labels; 0 for no label.
        tokens: L, tokens of a text; 0 for none.
        token_channels: D, channels of a token's embedding.
        pooled_channels: E, channels of a whole text's embedding; 0 for none.
        vector_channels: V, channels of another embedding; 0 for none.
    """

    classes: int = 0
    tokens: int = 0
    token_channels: int = 0
    pooled_channels: int = 0
    vector_channels: int = 0

    @property
    def has_text(self) -> bool:
        """Whether texts are among the parts."""
        return bool(self.tokens or self.pooled_channels)

    @property
    def is_packed(self) -> bool:
        """Whether conditions are packed: there are other parts than a class label."""
        return self.has_text or bool(self.vector_channels)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of one sample, by its name in `ConditionParts`."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.classes:
            shapes["label"] = ()
        if self.tokens:
            shapes["tokens"] = (self.tokens, self.token_channels)
            shapes["mask"] = (self.tokens,)
        if self.pooled_channels:
            shapes["pooled"] = (self.pooled_channels,)
        if self.has_text:
            shapes["has_text"] = ()
        if self.vector_channels:
            shapes["vector"] = (self.vector_channels,)
            shapes["has_vector"] = ()
        return shapes

    @property
    def size(self) -> int:
        """K, the length of a packed condition."""
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    def pack(self, parts: ConditionParts) -> Tensor:
        """Return the conditions as vectors, (B, K) float32.

        Raises:
            ValueError: a part is missing, has another shape, or is not in the layout.
        """
        shapes = self.shapes()
        flat = []
        for field in fields(parts):
            value = getattr(parts, field.name)
            if value is None and field.name not in shapes:
                continue
            found = "none" if value is None else tuple(value.shape[1:])
            expected = shapes.get(field.name, "none")
            if found != expected:
                raise ValueError(
                    f"the {field.name} of a condition has shape {found}, expected {expected}"
                )
            flat.append(value.flatten(1) if value.dim() > 1 else value[:, None])
        return torch.cat([part.float() for part in flat], dim=1)

    def unpack(self, packed: Tensor) -> ConditionParts:
        """Return the parts of packed conditions, (B, K); floats keep the dtype of `packed`.

        Raises:
            ValueError: the vectors have another length.
        """
        if packed.dim() != 2 or packed.shape[1] != self.size:
            raise ValueError(
                f"conditions have the shape {tuple(packed.shape)}, expected (B, {self.size}) for "
                f"{self}"
            )
        parts: dict[str, Tensor] = {}
        start = 0
        for name, shape in self.shapes().items():
            size = torch.Size(shape).numel()
            value = packed[:, start : start + size].reshape(-1, *shape)
            if name == "label":
                value = value.long()
            elif name in ("mask", "has_text", "has_vector"):
                value = value > 0.5
            parts[name] = value
            start += size
        return ConditionParts(**parts)

    def null(self, count: int, device: torch.device | None = None) -> Tensor:
        """Return conditions without any part, (count, K) float32."""
        packed = torch.zeros(count, self.size, device=device)
        if self.classes:
            packed[:, 0] = self.classes
        return packed
