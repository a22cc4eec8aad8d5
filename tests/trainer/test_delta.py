"""Weight deltas: a student as the difference of its weights from its base's."""

import json

import pytest
import torch

from deploy.delta import delta, difference
from models.checkpoint import FORMAT, fingerprint, load_checkpoint
from models.codec import KL, save_codec
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.description import describe
from models.interpolant import Linear, Trigonometric
from models.nets.dit import DiT
from models.prediction import Velocity
from models.tensors import read_safetensors, to_safetensors
from tests.helpers.codecs import small_vae
from tests.helpers.refusals import refused
from tests.helpers.teachers import save_teacher
from trainer.module import inherit_weights


def denoiser(seed, interpolant=None, **net):
    """Return a small denoiser with random weights everywhere, also where DiT starts with zeros."""
    torch.manual_seed(seed)
    small = {"size": 4, "channels": 1, "patch": 2, "width": 8, "depth": 1, "heads": 2}
    net = DiT(**{**small, **net})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, interpolant or Linear(), Velocity())


def saved(path, model):
    """Write a denoiser as a checkpoint and return its path."""
    spec = {"format": FORMAT, "codec": None, "denoiser": describe(model)}
    spec["condition"] = describe(Unconditional())
    path.write_bytes(to_safetensors(model.state_dict(), {"rectify": json.dumps(spec)}))
    return path


def perturbed(model, by, seed=9):
    """Return a copy of a denoiser, each weight multiplied by a random factor in 1 +- by / 2."""
    other = denoiser(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for copied, weight in zip(other.parameters(), model.parameters()):
            copied.copy_(weight * (1 + by * (torch.rand(weight.shape, generator=generator) - 0.5)))
    return other


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base.safetensors", denoiser(0))


def assert_round_trip(tmp_path, base, student):
    """Make a delta, apply it to the base, check that the student comes back; return the tensors."""
    run = saved(tmp_path / "student.safetensors", student)
    delta(base, tmp_path / "delta.safetensors", run=run)
    delta(base, tmp_path / "again.safetensors", apply=tmp_path / "delta.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")[0]
    assert fingerprint(again) == fingerprint(student)
    return read_safetensors(tmp_path / "delta.safetensors")[0]


def test_a_student_near_its_base_comes_back_bit_for_bit_without_corrections(tmp_path, base):
    """Sterbenz' lemma: the difference of weights within a factor of two of each other is exact."""
    tensors = assert_round_trip(tmp_path, base, perturbed(denoiser(0), 0.5))
    assert not any(name.startswith("at/") for name in tensors)


def test_a_student_far_from_its_base_comes_back_bit_for_bit(tmp_path, base):
    tensors = assert_round_trip(tmp_path, base, denoiser(1))
    assert any(name.startswith("at/") for name in tensors)


def test_a_student_with_more_inputs_than_its_base_comes_back(tmp_path, base):
    student = denoiser(1, two_time=True)
    inherit_weights(student, denoiser(0))
    assert_round_trip(tmp_path, base, student)


def test_values_that_a_sum_rounds_away_are_stored():
    value = torch.tensor([1e-9, -0.0, 3.0, float.fromhex("0x1.000002p0")])
    start = torch.tensor([1.0, 0.0, 2.0, -1e4])
    step, at, exact = difference(value, start)
    assert {0, 1} <= set(at.tolist())
    assert 2 not in at.tolist()
    again = start + step
    again[at] = exact
    assert torch.equal(again, value)
    assert torch.equal(again.signbit(), value.signbit())


def test_a_fine_tune_of_the_base_gets_the_same_difference(tmp_path, base):
    first = denoiser(0)
    student = perturbed(denoiser(0), 0.1)
    tuned = perturbed(denoiser(0), 0.05, seed=5)
    run = saved(tmp_path / "student.safetensors", student)
    delta(base, tmp_path / "delta.safetensors", run=run)
    other = saved(tmp_path / "tuned.safetensors", tuned)
    delta(other, tmp_path / "rectified.safetensors", apply=tmp_path / "delta.safetensors")
    found = load_checkpoint(tmp_path / "rectified.safetensors")[0].state_dict()
    for name, value in student.state_dict().items():
        wanted = tuned.state_dict()[name] + (value - first.state_dict()[name])
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "interpolant", "net"),
    [("interpolant", Trigonometric(), {}), ("net", None, {"width": 16})],
    ids=["interpolant", "net"],
)
def test_applying_to_a_model_that_is_no_fine_tune_is_refused(
    tmp_path, base, part, interpolant, net
):
    made = tmp_path / "delta.safetensors"
    delta(base, made, run=saved(tmp_path / "student.safetensors", perturbed(denoiser(0), 0.1)))
    other = saved(tmp_path / "other.safetensors", denoiser(0, interpolant, **net))
    with refused("other.safetensors", part, "fine-tune"):
        delta(other, tmp_path / "out.safetensors", apply=made)
    assert not (tmp_path / "out.safetensors").exists()


def latent_run(folder, seed, vae):
    """Write the run of a denoiser in an autoencoder's latents, and return it."""
    save_codec(vae, folder / "vae")
    model = denoiser(seed, channels=4)
    return save_teacher(folder / "run", model, Unconditional(), KL(str(folder / "vae")))


def test_latents_of_another_scale_are_refused_and_other_weights_reported(tmp_path, caplog):
    base = latent_run(tmp_path / "base", 0, small_vae())
    other = latent_run(tmp_path / "other", 0, small_vae(scaling_factor=2.0))
    student = latent_run(tmp_path / "student", 1, small_vae())
    made = tmp_path / "delta.safetensors"
    with refused(student, "codec", "scale", 2.0):
        delta(other, made, run=student)
    delta(base, made, run=student)
    with refused(other, "scale", 2.0):
        delta(other, tmp_path / "x.safetensors", apply=made)
    pixels = saved(tmp_path / "pixels.safetensors", denoiser(0, channels=4))
    with refused(pixels, "scale", None):
        delta(pixels, tmp_path / "x.safetensors", apply=made)
    assert not (tmp_path / "x.safetensors").exists()

    # A fine-tune may have a decoder of its own.
    vae = small_vae()
    torch.nn.init.normal_(vae.decoder.conv_out.weight)
    tuned = latent_run(tmp_path / "tuned", 0, vae)
    caplog.set_level("INFO")
    delta(tuned, tmp_path / "rectified.safetensors", apply=made)
    assert [line for line in caplog.messages if str(tuned) in line and "codec" in line]


@pytest.mark.parametrize("net", [{"width": 16}, {"depth": 2}], ids=["width", "depth"])
def test_a_student_of_another_base_is_refused(tmp_path, net):
    run = saved(tmp_path / "student.safetensors", perturbed(denoiser(0), 0.1))
    other = saved(tmp_path / "other.safetensors", denoiser(0, **net))
    with refused(run, "--base"):
        delta(other, tmp_path / "out.safetensors", run=run)
    assert not (tmp_path / "out.safetensors").exists()


def test_applying_a_file_that_is_no_delta_is_refused(tmp_path, base):
    with refused("base.safetensors", "delta", "rectify delta"):
        delta(base, tmp_path / "out.safetensors", apply=base)


def test_applying_a_missing_delta_is_refused(tmp_path, base):
    with refused("nowhere.safetensors", "rectify delta", kind=FileNotFoundError):
        delta(base, tmp_path / "out.safetensors", apply=tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("given", [(), ("run", "apply")], ids=["neither", "both"])
def test_exactly_one_of_run_and_apply_must_be_given(tmp_path, base, given):
    with refused("--run", "--apply"):
        delta(base, tmp_path / "out.safetensors", **dict.fromkeys(given, base))


def test_overwriting_an_input_is_refused(base):
    with refused(base, "--out"):
        delta(base, base, run=base)
