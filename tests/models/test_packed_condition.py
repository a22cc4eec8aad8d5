"""Packed conditions: every part comes back, and none is told from zeros."""

import pytest
import torch

from models.packed_condition import ConditionLayout, ConditionParts

LAYOUTS = [
    ConditionLayout(tokens=3, token_channels=4),
    ConditionLayout(pooled_channels=5),
    ConditionLayout(classes=7, vector_channels=2),
    ConditionLayout(classes=2, tokens=3, token_channels=4, pooled_channels=5, vector_channels=6),
]


def make_parts(layout: ConditionLayout, count: int) -> ConditionParts:
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in layout.shapes().items():
        values[name] = torch.randn(count, *shape, generator=generator)
        if name in ("mask", "has_text", "has_vector"):
            values[name] = values[name] > 0
    if layout.classes:
        values["label"] = torch.randint(layout.classes + 1, (count,), generator=generator)
    return ConditionParts(**values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_unpacking_returns_every_part_bit_for_bit(layout):
    parts = make_parts(layout, 9)
    packed = layout.pack(parts)
    assert packed.shape == (9, layout.size)
    found = layout.unpack(packed)
    for name, expected in vars(parts).items():
        value = getattr(found, name)
        if expected is None:
            assert value is None
        else:
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_the_null_condition_has_no_part(layout):
    parts = layout.unpack(layout.null(4))
    for name, value in vars(parts).items():
        if name == "label" and value is not None:
            assert (value == layout.classes).all()
        elif value is not None:
            assert not value.any()


def test_a_large_label_is_exact():
    layout = ConditionLayout(classes=2**20, vector_channels=1)
    parts = ConditionParts(
        label=torch.tensor([2**20 - 1, 2**20]),
        vector=torch.ones(2, 1),
        has_vector=torch.ones(2, dtype=torch.bool),
    )
    assert layout.unpack(layout.pack(parts)).label.tolist() == [2**20 - 1, 2**20]


def test_a_part_of_another_shape_is_named():
    layout = ConditionLayout(pooled_channels=5)
    parts = ConditionParts(pooled=torch.ones(2, 4), has_text=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="pooled"):
        layout.pack(parts)
    with pytest.raises(ValueError, match="label"):
        layout.pack(make_parts(LAYOUTS[2], 2))


def test_vectors_of_another_length_are_refused():
    with pytest.raises(ValueError, match="shape"):
        LAYOUTS[0].unpack(torch.zeros(2, LAYOUTS[0].size + 1))
