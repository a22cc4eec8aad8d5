"""A student as its difference from its base."""

import json

import pytest
import torch

from models import teacher
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.interpolant import Linear, Trigonometric
from models.nets.dit import DiT
from models.prediction import Velocity
from models.tensors import packed, unpacked
from trainer.delta import delta, difference
from trainer.module import inherit


def denoiser(seed, interpolant=None, **net):
    """Return a small denoiser, all of whose weights matter."""
    torch.manual_seed(seed)
    net = DiT(**{"size": 4, "channels": 1, "patch": 2, "width": 8, "depth": 1, "heads": 2, **net})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, interpolant or Linear(), Velocity())


def kept(path, model):
    """Write a denoiser as a checkpoint."""
    spec = {"format": teacher.FORMAT, "codec": None, "denoiser": teacher.describe(model)}
    spec["condition"] = teacher.describe(Unconditional())
    path.write_bytes(packed(model.state_dict(), {"rectify": json.dumps(spec)}))
    return path


def moved(model, by, seed=9):
    """Return a denoiser whose weights are those of another one, moved at random."""
    other, generator = denoiser(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), model.parameters()):
            ours.copy_(theirs * (1 + by * (torch.rand(theirs.shape, generator=generator) - 0.5)))
    return other


@pytest.fixture
def base(tmp_path):
    return kept(tmp_path / "base.safetensors", denoiser(0))


def there_and_back(tmp_path, base, student):
    run = kept(tmp_path / "student.safetensors", student)
    delta(base, tmp_path / "delta.safetensors", run=run)
    delta(base, tmp_path / "again.safetensors", apply=tmp_path / "delta.safetensors")
    again = teacher.load(tmp_path / "again.safetensors")[0]
    assert teacher.fingerprint(again) == teacher.fingerprint(student)
    return unpacked(tmp_path / "delta.safetensors")[0]


def test_a_student_comes_back_bit_for_bit(tmp_path, base):
    near = there_and_back(tmp_path, base, moved(denoiser(0), 0.5))
    assert not any(name.startswith("at/") for name in near)  # Sterbenz: nothing is lost within a factor of two
    far = there_and_back(tmp_path, base, denoiser(1))
    assert any(name.startswith("at/") for name in far)


def test_a_student_that_reads_more_than_its_base_comes_back(tmp_path, base):
    student = denoiser(1, jumps=True)
    inherit(student, denoiser(0))
    there_and_back(tmp_path, base, student)


def test_what_a_sum_rounds_away_is_kept():
    value, start = torch.tensor([1e-9, -0.0, 3.0, float.fromhex("0x1.000002p0")]), torch.tensor([1.0, 0.0, 2.0, -1e4])
    step, at, exact = difference(value, start)
    assert {0, 1} <= set(at.tolist()) and 2 not in at.tolist()
    again = start + step
    again[at] = exact
    assert torch.equal(again, value) and torch.equal(again.signbit(), value.signbit())


def test_a_fine_tune_of_the_base_gets_the_same_difference(tmp_path, base):
    first, student, tuned = denoiser(0), moved(denoiser(0), 0.1), moved(denoiser(0), 0.05, seed=5)
    delta(base, tmp_path / "delta.safetensors", run=kept(tmp_path / "student.safetensors", student))
    other = kept(tmp_path / "tuned.safetensors", tuned)
    delta(other, tmp_path / "rectified.safetensors", apply=tmp_path / "delta.safetensors")
    found = teacher.load(tmp_path / "rectified.safetensors")[0].state_dict()
    for name, value in student.state_dict().items():
        wanted = tuned.state_dict()[name] + (value - first.state_dict()[name])
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)


def test_what_is_no_fine_tune_is_refused(tmp_path, base):
    run = kept(tmp_path / "student.safetensors", moved(denoiser(0), 0.1))
    made = tmp_path / "delta.safetensors"
    delta(base, made, run=run)
    others = {"interpolant": denoiser(0, Trigonometric()), "net": denoiser(0, width=16)}
    for part, model in others.items():
        other = kept(tmp_path / "other.safetensors", model)
        with pytest.raises(ValueError, match=f"other.safetensors: its {part} is .* give that or a fine-tune of it"):
            delta(other, tmp_path / "out.safetensors", apply=made)
    with pytest.raises(ValueError, match="it is no student of it"):
        delta(kept(tmp_path / "other.safetensors", denoiser(0, width=16)), tmp_path / "out.safetensors", run=run)
    with pytest.raises(ValueError, match="it is no student of it"):
        delta(kept(tmp_path / "other.safetensors", denoiser(0, depth=2)), tmp_path / "out.safetensors", run=run)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_delta_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match="base.safetensors: not a delta"):
        delta(base, tmp_path / "out.safetensors", apply=base)
    for both in ({}, {"run": base, "apply": base}):
        with pytest.raises(ValueError, match="give either --run"):
            delta(base, tmp_path / "out.safetensors", **both)
    with pytest.raises(ValueError, match="is what is read"):
        delta(base, base, run=base)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such delta"):
        delta(base, tmp_path / "out.safetensors", apply=tmp_path / "nowhere.safetensors")
