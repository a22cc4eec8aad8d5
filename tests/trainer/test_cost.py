"""What methods cost: every forward pass of a denoiser is counted, whoever makes it."""

import json
import shutil

import pytest
import torch
from PIL import Image

from data.files import write_json
from data.pack import pack
from data.pairs import PairSet
from deploy.report.summary import sum_costs
from models import sampler as samplers
from models.checkpoint import newest_checkpoint, read_checkpoint
from models.denoiser import Denoiser, count_evaluations
from models.guidance import Guided
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from models.retimed import Retimed
from tests.helpers.commands import run_command
from tests.helpers.refusals import refused
from tests.helpers.training import fit_words, log_lines, small_config, spec, train
from trainer.callbacks.metrics_log import MetricsLog
from trainer.jobs.collect import collect
from trainer.jobs.options import SamplingOptions
from trainer.objectives import Consistency, Matching, MeanFlow, Objective, Phased
from trainer.objectives.teachers import FrozenTeacher

DETERMINISTIC = ["DDIM", "DPMSolver2M", "EDMHeun", "Euler", "Heun", "Midpoint", "RungeKutta4"]


class Half(torch.nn.Module):
    """A network for any shape."""

    def forward(self, x_t, time_input, cond=None):
        return x_t / 2


def half_denoiser():
    return Denoiser(Half(), Linear(), Velocity())


class MatchingWithTeacher(Objective):
    """Matching; a teacher of its own also evaluates every other sample twice."""

    def __init__(self):
        self.matching = Matching()
        self.teacher = half_denoiser()

    def __call__(self, denoiser, x, eps, cond=None, random=None):
        for _ in range(2):
            self.teacher(x[::2], torch.tensor(0.5))
        return self.matching(denoiser, x, eps, cond, random)


@pytest.fixture
def count():
    """Return a function that returns the number of evaluations since the test began."""
    with count_evaluations() as counter:
        yield lambda: counter.count


# One call, one step of training


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_sampler_makes_as_many_evaluations_as_its_nfe(count, name, scale):
    denoiser = Guided(Retimed(half_denoiser(), Linear()), scale, 0.0, 0.7)
    sampler = getattr(samplers, name)(3)
    sampler(denoiser, torch.randn(5, 1, 2, 2))
    assert count() == 5 * sampler.nfe(denoiser)


def test_a_forward_mode_derivative_counts_as_one_evaluation(count):
    denoiser = half_denoiser()
    x = torch.randn(2, 3, 1, 2, 2)
    t = torch.full((3,), 0.5)
    torch.func.jvp(lambda x_t: denoiser(x_t, t)[0], (x[0],), (x[1],))
    assert count() == 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 16 tiny images, and 2 held out."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set"


@pytest.fixture(scope="module")
def config(images):
    """The configuration of a tiny training that logs every other step."""
    source = spec("Images", path=str(images / "train"))
    return {**small_config(source), "metrics": {"every": 2}}


@pytest.fixture(scope="module")
def heldout(images):
    """Words with which a run validates."""
    return ("--data.heldout", "Images", "--data.heldout.path", images / "heldout")


@pytest.fixture(scope="module")
def one_step_run(config, tmp_path_factory):
    """A run of one step, which no test changes."""
    return train(config, tmp_path_factory.mktemp("one-step") / "run", steps=1)


@pytest.mark.parametrize(
    ("make", "two_time", "needed"),
    [
        # Matching: one pass of the student.
        (lambda run: Matching(), False, 1),
        # PeRFlow (arXiv 2405.07510): the solve of the window, and the student.
        (lambda run: Phased(FrozenTeacher(run), windows=4, steps=8), False, 1 + 8),
        # Consistency distillation (arXiv 2303.01469, algorithm 2): student, teacher, target.
        (lambda run: Consistency(FrozenTeacher(run)), False, 3),
        # Consistency training (arXiv 2303.01469, algorithm 3): student and target.
        (lambda run: Consistency(), False, 2),
        # MeanFlow (arXiv 2505.13447, algorithm 1): one pass with its derivative.
        (lambda run: MeanFlow(), True, 1),
    ],
    ids=["matching", "phased", "distillation", "training", "meanflow"],
)
def test_a_step_costs_what_the_methods_paper_needs(one_step_run, count, make, two_time, needed):
    objective = make(one_step_run)
    net = DiT(size=8, channels=1, patch=4, width=16, depth=1, heads=2, two_time=two_time)
    x, eps = torch.randn(2, 64, 1, 8, 8)
    before = count()
    objective(Denoiser(net, Linear(), Velocity()), x, eps).total.backward()
    assert count() - before <= 1.1 * 64 * needed


# The count in the log and in checkpoints


def logged_counts(run):
    """Return the counts of a run's log by step."""
    return {line["step"]: line["evaluations"] for line in log_lines(run) if "loss" in line}


def stored_count(run):
    """Return the count in a run's newest checkpoint."""
    return read_checkpoint(newest_checkpoint(run))["evaluations"]


def test_a_run_counts_its_samples_and_logs_its_last_step(config, tmp_path):
    run = train(config, tmp_path / "run", steps=3)
    assert logged_counts(run) == {2: 16, 3: 24}
    assert stored_count(run) == 24


def test_accumulated_batches_count_and_validation_does_not(config, heldout, tmp_path):
    """A batch is cut into parts: accumulation does not change the number of samples of a step."""
    interval = ("--trainer.val_check_interval", 1)
    accumulate = ("--trainer.accumulate_grad_batches", 2)
    run = train(config, tmp_path / "run", *heldout, *interval, *accumulate, steps=3)
    assert logged_counts(run) == {2: 16, 3: 24}
    assert any("heldout_loss" in line for line in log_lines(run))


TEACHER = ("--model.objective", "tests.trainer.test_cost.MatchingWithTeacher")


def test_evaluations_made_by_an_objective_are_counted(config, tmp_path):
    run = train(config, tmp_path / "run", *TEACHER, steps=5)
    assert logged_counts(run) == {2: 32, 4: 64, 5: 80}  # of each batch: 8 samples, and twice 4
    assert stored_count(run) == 80


def test_a_resumed_run_continues_the_count(config, tmp_path):
    run = train(config, tmp_path / "run", *TEACHER, "--checkpoints.every", 1, steps=3)
    train(config, run, *TEACHER, steps=5)
    assert logged_counts(run) == {2: 32, 3: 48, 4: 64, 5: 80}
    assert stored_count(run) == 80


def test_a_run_that_did_not_count_from_its_start_has_no_count(config, tmp_path):
    run = train(config, tmp_path / "run", steps=1)
    path = newest_checkpoint(run)
    content = read_checkpoint(path, resume=True)
    del content["evaluations"]
    torch.save(content, path)
    train(config, run, steps=4)
    assert [line["step"] for line in log_lines(run) if "evaluations" in line] == [1]
    assert stored_count(run) is None


@pytest.mark.parametrize(("sampler", "guidance", "each"), [("DDIM", 1.0, 3), ("Heun", 2.0, 12)])
def test_a_pair_set_records_what_it_cost(one_step_run, tmp_path, count, sampler, guidance, each):
    out = tmp_path / "pairs"
    before = count()
    collect(
        one_step_run,
        out,
        pairs=10,
        steps=3,
        sampler=sampler,
        sampling=SamplingOptions(guidance=guidance),
        shard=8,
        batch=8,
    )
    assert count() - before == 10 * each
    assert PairSet(out).manifest["evaluations"] == 10 * each


# Validation, kills and the log


def heldout_losses(run):
    """Return the steps and held-out losses of a run's validations."""
    lines = [line for line in log_lines(run) if "heldout_loss" in line]
    return [(line["step"], line["heldout_loss"]) for line in lines]


@pytest.fixture(scope="module")
def validating(heldout):
    """Words with which a run validates, and saves, after every other step."""
    return (*heldout, "--trainer.val_check_interval", 2, "--checkpoints.every", 2)


@pytest.fixture(scope="module")
def uninterrupted(config, validating, tmp_path_factory):
    """A run of four steps that nothing interrupts."""
    return train(config, tmp_path_factory.mktemp("uninterrupted") / "run", *validating, steps=4)


def crash_in(hook, last):
    """Return a hook of the metrics that raises an error after step `last`."""
    original = getattr(MetricsLog, hook)

    def crash(self, trainer, module):
        if trainer.global_step == last:
            raise ZeroDivisionError
        original(self, trainer, module)

    return crash


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_end"])
def test_no_heldout_loss_is_lost_to_a_kill(
    config, validating, uninterrupted, monkeypatch, tmp_path, hook
):
    """The run ends before or after a validation at a step with a checkpoint, also the last one."""
    run = tmp_path / "run"
    for last in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(MetricsLog, hook, crash_in(hook, last))
            assert run_command(*fit_words(config, run, *validating, steps=4)) != 0
    train(config, run, *validating, steps=4)
    assert [step for step, _ in heldout_losses(run)] == [2, 4]
    assert heldout_losses(run) == heldout_losses(uninterrupted)


@pytest.mark.parametrize("interval", [2, "00:01:00:00"])
def test_saving_does_not_wait_for_a_validation_that_does_not_come(
    config, heldout, tmp_path, interval
):
    every = ("--trainer.val_check_interval", interval, "--checkpoints.every", 3)
    words = (*heldout, *every, "--checkpoints.keep", 99)
    run = train(config, tmp_path / "run", *words, steps=13)
    paths = sorted((run / "checkpoints").glob("step=*"))
    assert [int(path.stem[5:]) for path in paths] == [3, 6, 9, 12, 13]


# The cost of a pipeline


def write_log(run, *lines):
    """Write the log of a run: a mean loss in each of `lines`."""
    run.mkdir(exist_ok=True)
    text = "".join(json.dumps({"loss": 1.0, **line}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text)


def write_run(run, step, every, max_steps):
    """Write a checkpoint and the configuration of a run."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / f"step={step:09d}.ckpt").touch()
    write_json(
        run / "config.yaml", {"metrics": {"every": every}, "trainer": {"max_steps": max_steps}}
    )


@pytest.fixture
def pipeline(tmp_path):
    """A folder with all kinds of artefacts: a run, a run without counts, pairs, latents."""
    for name in ("pairs", "latents"):
        (tmp_path / name).mkdir()
    write_log(tmp_path / "teacher", {"step": 1, "evaluations": 8}, {"step": 2, "evaluations": 16})
    with (tmp_path / "teacher" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 2, "heldout_loss": 1.0}) + "\n")
    write_log(tmp_path / "autoencoder", {"step": 1})
    write_json(tmp_path / "pairs" / "manifest.json", {"kind": "pairs", "evaluations": 100})
    write_json(tmp_path / "latents" / "manifest.json", {"kind": "latents"})
    return tmp_path


def test_the_cost_of_a_pipeline_is_the_sum_of_its_stages(pipeline):
    assert sum_costs(pipeline) == {"evaluations": {"pairs": 100, "teacher": 16}, "total": 116}


def test_the_log_of_a_finished_run_may_be_shorter_than_its_interval(pipeline):
    write_run(pipeline / "teacher", step=2, every=20, max_steps=2)
    assert sum_costs(pipeline)["total"] == 116


def test_the_interval_of_a_log_may_have_changed(tmp_path):
    """The log has a line every 4 steps, the configuration now has 3."""
    write_log(tmp_path / "run", {"step": 4, "evaluations": 1}, {"step": 8, "evaluations": 1})
    write_run(tmp_path / "run", step=10, every=3, max_steps=20)
    assert sum_costs(tmp_path)["evaluations"]["run"] == 1


def test_a_log_that_has_lost_its_end_is_refused(pipeline):
    write_log(pipeline / "teacher", {"step": 1, "evaluations": 8})
    write_run(pipeline / "teacher", step=2, every=20, max_steps=2)
    with refused("metrics.jsonl", 1, "step=000000002.ckpt"):
        sum_costs(pipeline)


def test_a_negative_count_is_refused(pipeline):
    shutil.rmtree(pipeline / "teacher")
    write_json(pipeline / "pairs" / "manifest.json", {"kind": "pairs", "evaluations": -1})
    with refused("manifest.json", "evaluations", -1):
        sum_costs(pipeline)
