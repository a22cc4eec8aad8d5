"""Two-time denoisers, which jump from t to s; DDIM steps by their jumps."""

import pytest
import torch

from models.checkpoint import load_checkpoint
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Velocity, VPrediction
from models.retimed import Retimed
from models.sampler import DDIM
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from tests.helpers.teachers import save_teacher
from tests.oracle import Flow
from trainer.module import Generator, inherit_weights
from trainer.objectives import (
    Consistency,
    Matching,
    MeanFlow,
    Online,
    Regression,
    Shortcut,
    StepMaps,
)
from trainer.objectives.teachers import EMATeacher

SIZES = {"size": 4, "channels": 2, "patch": 2, "width": 16, "depth": 1, "heads": 2}


def randomise(module):
    """Draw new weights: as initialised, a DiT predicts zero."""
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.1)


@every_interpolant
def test_two_states_determine_data_and_noise(interpolant):
    x, eps = torch.randn(2, 7, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0.3, 0.9, 7, dtype=torch.float64)
    s = t - 0.25
    x_t = interpolant.mix(x, eps, t)
    x_s = interpolant.mix(x, eps, s)
    x_found, eps_found = interpolant.solve_pair(x_t, t, x_s, s)
    torch.testing.assert_close(x_found, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(eps_found, eps, rtol=1e-8, atol=1e-8)


@every_interpolant
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scale", [None, 3.0], ids=["plain", "guided"])
def test_ddim_steps_by_exact_jumps(interpolant, steps, scale):
    """Any number of jumps of the ODE's exact map ends at the same states, with guidance too."""
    flow = Flow(interpolant)
    denoiser = flow if scale is None else Guided(flow, scale)
    times = torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
    x_t = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    expected = flow.map(x_t, times[:1].expand(9), times[-1:].expand(9))
    found = DDIM(steps, times.tolist()).integrate(denoiser, x_t)[-1]
    torch.testing.assert_close(found, expected)


def test_jumps_are_retimed():
    """A jump on another interpolant is the jump between times of equal SNR."""
    eps = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    sampler = DDIM(2, [0.9, 0.5, 0.2])
    retimed = Retimed(Flow(VariancePreserving()), Linear())
    found = sampler.integrate(retimed, eps)[-1]
    expected = sampler.integrate(Flow(Linear()), eps)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def random_teacher():
    """Return a denoiser that reads neither a second time nor a scale, with random weights."""
    teacher = Denoiser(DiT(**SIZES), Trigonometric(), VPrediction())
    randomise(teacher)
    return teacher


@pytest.mark.parametrize("inputs", [[], ["s"], ["s", "w"]], ids=["t", "t-s", "t-s-w"])
def test_a_student_with_more_inputs_starts_as_its_teacher(inputs):
    """At any second time and any scale."""
    teacher = random_teacher()
    student = Denoiser(
        DiT(**SIZES, two_time=True, guidance_embedded=True), Trigonometric(), VPrediction()
    )
    inherit_weights(student, teacher)
    x_t = torch.randn(5, 2, 4, 4)
    t = torch.linspace(0.2, 1, 5)
    values = {"s": t / 3, "w": 2 * t}
    found = student(x_t, t, **{name: values[name] for name in inputs})
    torch.testing.assert_close(torch.stack(found), torch.stack(teacher(x_t, t)))


def test_a_teacher_that_lacks_other_weights_is_refused():
    """Only the weights of the student's extra inputs may be missing."""
    deeper = Denoiser(DiT(**{**SIZES, "depth": 2}), Trigonometric(), VPrediction())
    with pytest.raises(RuntimeError, match="Missing key"):
        inherit_weights(deeper, random_teacher())


def test_a_second_time_is_refused_by_a_one_time_network():
    t = torch.linspace(0.2, 1, 5)
    with refused("two_time"):
        random_teacher()(torch.randn(5, 2, 4, 4), t, s=t)


def two_time_denoiser():
    """Return a denoiser that reads a second time and a scale, with random weights."""
    net = DiT(**SIZES, two_time=True, guidance_embedded=True)
    randomise(net)
    return Denoiser(net, Linear(), Velocity())


def test_samplers_use_no_jumps_that_were_not_learnt():
    """Also where the denoiser is guided, or retimed."""
    denoiser = two_time_denoiser()
    eps = torch.randn(5, 2, 4, 4)
    jumps = DDIM(2)(denoiser, eps)
    denoiser.jumps = False
    plain = DDIM(2)(denoiser, eps)
    assert not torch.allclose(plain, jumps, atol=1e-4)
    for wrapped in (Guided(denoiser, 1.0), Retimed(denoiser, Linear())):
        torch.testing.assert_close(DDIM(2)(wrapped, eps), plain, rtol=1e-5, atol=1e-5)
    # Euler's step on the velocity at one time
    t = torch.full((5,), 1.0)
    x_hat, eps_hat = denoiser(eps, t)
    middle = (x_hat + eps_hat) / 2
    x_hat, _ = denoiser(middle, t / 2)
    torch.testing.assert_close(plain, x_hat)
    with refused("two_time", "jumps"):
        denoiser(eps, t, s=t / 2)


OBJECTIVES = {
    "matching": (Matching(), False),
    "online-matching": (Online(EMATeacher(), Matching()), False),
    "online-meanflow": (Online(EMATeacher(), MeanFlow()), True),
    "meanflow": (MeanFlow(), True),
    "shortcut": (Shortcut(), True),
    "regression": (Regression(), True),
    "consistency": (Consistency(), True),
    "step-maps": (StepMaps(), True),
}


@pytest.mark.parametrize(("objective", "jumps"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_run_records_what_its_objective_teaches(objective, jumps, tmp_path):
    denoiser = two_time_denoiser()
    module = Generator(denoiser, objective)
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["rectify"]["jumps"] == denoiser.jumps == denoiser.two_time == jumps
    run = save_teacher(tmp_path / "run", denoiser, Unconditional(), jumps=jumps)
    assert load_checkpoint(run).denoiser.two_time == jumps


def test_a_run_that_records_nothing_jumps(tmp_path):
    run = save_teacher(tmp_path / "run", two_time_denoiser(), Unconditional())
    assert load_checkpoint(run).denoiser.two_time


def test_a_record_that_is_no_truth_value_is_refused(tmp_path):
    run = save_teacher(tmp_path / "run", two_time_denoiser(), Unconditional(), jumps="no")
    with refused("step=", "jumps", "no"):
        load_checkpoint(run)


def test_a_one_time_network_records_no_jumps():
    assert "jumps" not in Generator(random_teacher(), Matching()).spec


def test_the_second_time_and_the_scale_have_defaults():
    """They are s = t and w = 1."""
    denoiser = two_time_denoiser()
    x_t = torch.randn(5, 2, 4, 4)
    t = torch.full((5,), 0.8)
    found = denoiser(x_t, t, s=t, w=torch.ones(5))[0]
    torch.testing.assert_close(found, denoiser(x_t, t)[0])


@pytest.mark.parametrize(
    "argument", [{"s": torch.full((5,), 0.4)}, {"w": 3 * torch.ones(5)}], ids=["s", "w"]
)
def test_the_second_time_and_the_scale_change_the_output(argument):
    denoiser = two_time_denoiser()
    x_t = torch.randn(5, 2, 4, 4)
    t = torch.full((5,), 0.8)
    assert not torch.allclose(denoiser(x_t, t, **argument)[0], denoiser(x_t, t)[0], atol=1e-4)
