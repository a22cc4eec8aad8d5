"""What methods cost: every forward pass of a denoiser is counted where it is made, whoever asks for it."""

import json
import shutil

import pytest
import torch
from PIL import Image

from data.files import write_json
from data.images import pack
from data.pairs import PairSet
from deploy.cli import main
from models import sampler as samplers
from models import teacher
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from models.retimed import Retimed
from trainer.callbacks.metrics import Metrics
from trainer.collect import collect
from trainer.objectives import Consistency, Matching, MeanFlow, Objective, Phased
from trainer.objectives.frozen import Frozen
from trainer.report.summary import cost

DETERMINISTIC = ["DDIM", "DPMSolver2M", "EDMHeun", "Euler", "Heun", "Midpoint", "RungeKutta4"]


class Half(torch.nn.Module):
    """A network that any shape goes through."""

    def forward(self, x_t, clock, cond=None):
        return x_t / 2


class Asking(Objective):
    """Matching, after a teacher of its own was asked twice about every other sample."""

    def __init__(self):
        self.matching, self.other = Matching(), Denoiser(Half(), Linear(), Velocity())

    def __call__(self, denoiser, x, eps, cond=None, draws=None):
        for _ in range(2):
            self.other(x[::2], torch.tensor(0.5))
        loss = self.matching(denoiser, x, eps, cond, draws)
        self.seen = self.matching.seen
        return loss


@pytest.fixture
def spent():
    """Return a function that tells what was evaluated since the test began."""
    before = Denoiser.spent
    return lambda: Denoiser.spent - before


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_what_is_spent_is_what_samplers_say(spent, name, scale):
    denoiser = Guided(Retimed(Denoiser(Half(), Linear(), Velocity()), Linear()), scale, 0.0, 0.7)
    walk = getattr(samplers, name)(3)
    walk(denoiser, torch.randn(5, 1, 2, 2))
    assert spent() == 5 * walk.nfe(denoiser)


def test_a_derivative_forward_is_one_pass(spent):
    denoiser, x, t = Denoiser(Half(), Linear(), Velocity()), torch.randn(2, 3, 1, 2, 2), torch.full((3,), 0.5)
    torch.func.jvp(lambda x_t: denoiser(x_t, t)[0], (x[0],), (x[1],))
    assert spent() == 3


@pytest.mark.parametrize(
    ("make", "jumps", "needed"),
    [
        (lambda run: Matching(), False, 1),
        (lambda run: Phased(Frozen(run), windows=4, steps=8), False, 1 + 8),  # 2405.07510: the window's solve, and the student
        (lambda run: Consistency(Frozen(run)), False, 3),  # 2303.01469, algorithm 2: student, teacher's step, target
        (lambda run: Consistency(), False, 2),  # algorithm 3: student and target
        (lambda run: MeanFlow(), True, 1),  # 2505.13447, algorithm 1: one pass with its derivative
    ],
    ids=["matching", "phased", "distillation", "training", "meanflow"],
)
def test_a_step_costs_what_the_methods_paper_needs(train, spent, make, jumps, needed):
    run, _ = train(steps=1)
    objective = make(run)
    net = DiT(size=8, channels=1, patch=4, width=16, depth=1, heads=2, jumps=jumps)
    x, eps, before = *torch.randn(2, 64, 1, 8, 8), spent()
    objective(Denoiser(net, Linear(), Velocity()), x, eps).backward()
    assert spent() - before <= 1.1 * 64 * needed


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 16 tiny images, and 2 held out."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set"


@pytest.fixture(scope="module")
def train(images, tmp_path_factory):
    """Train in this process; return the run and the lines of its log."""

    def fit(*words, out=None, steps=3):
        out = out or tmp_path_factory.mktemp("fit") / "run"
        net = {"class_path": "DiT", "init_args": {"size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "heads": 2}}
        form = {"net": net, "interpolant": "Linear", "prediction": "Velocity"}
        denoiser = {"class_path": "Denoiser", "init_args": form}
        config = {
            "out": str(out),
            "model": {"class_path": "Generator", "init_args": {"denoiser": denoiser, "objective": "Matching"}},
            "data": {"source": {"class_path": "Images", "init_args": {"path": str(images / "train")}}, "batch": 8},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
            "trainer": {"max_steps": steps, "accelerator": "cpu", "logger": False},
            "metrics": {"every": 2},
        }
        path = out.parent / "run.yaml"
        path.write_text(json.dumps(config))
        assert not main(["fit", "--config", str(path), *words])
        return out, [json.loads(line) for line in (out / "metrics.jsonl").open()]

    return fit


def counts(lines):
    return {line["step"]: line["evaluations"] for line in lines if "loss" in line}


def test_a_run_counts_its_samples_and_its_last_step_has_a_line(train):
    run, lines = train()
    assert counts(lines) == {2: 16, 3: 24}
    assert teacher.read(teacher.newest(run))["evaluations"] == 24


def test_parts_of_a_batch_count_and_validation_does_not(train, images):
    heldout = ("--data.heldout", "Images", "--data.heldout.path", str(images / "heldout"), "--trainer.val_check_interval", "1")
    _, lines = train("--trainer.accumulate_grad_batches", "2", *heldout)
    assert counts(lines) == {2: 16, 3: 24} and any("heldout_loss" in line for line in lines)  # a batch is cut into its parts


def test_no_heldout_loss_is_lost_to_a_kill(train, images, monkeypatch, tmp_path):
    """The run ends where it would validate, or right after, at a step that has a checkpoint: also at the last one."""
    heldout = ("--data.heldout", "Images", "--data.heldout.path", str(images / "heldout"), "--trainer.val_check_interval", "2")
    words = (*heldout, "--checkpoints.every", "2")

    def losses(out):
        lines = map(json.loads, (out / "metrics.jsonl").open())
        return [(line["step"], line["heldout_loss"]) for line in lines if "heldout_loss" in line]

    undisturbed = losses(train(*words, steps=4)[0])
    for moment in ("on_validation_start", "on_validation_end"):
        (out := tmp_path / moment / "run").parent.mkdir()
        went_on = getattr(Metrics, moment)
        for last in (2, 4):

            def killed(self, trainer, module, last=last, went_on=went_on):
                if trainer.global_step == last:
                    raise ZeroDivisionError
                went_on(self, trainer, module)

            with monkeypatch.context() as patch, pytest.raises(AssertionError):
                patch.setattr(Metrics, moment, killed)
                train(*words, out=out, steps=4)
        assert [step for step, _ in undisturbed] == [2, 4] and losses(train(*words, out=out, steps=4)[0]) == undisturbed


@pytest.mark.parametrize("often", [(1, 4), (2, 4), (None, 0)])
def test_no_checkpoint_waits_for_a_validation_that_does_not_come(train, images, often):
    """Lightning may be told to count batches within epochs, and to leave epochs out."""
    words = ["--data.heldout", "Images", "--data.heldout.path", str(images / "heldout"), "--trainer.val_check_interval", "2"]
    if often[0]:
        words += ["--trainer.check_val_every_n_epoch", str(often[0]), "--trainer.limit_train_batches", str(often[1])]
    run, _ = train(*words, "--checkpoints.every", "3", "--checkpoints.keep", "99", steps=13)
    assert [int(path.stem[5:]) for path in sorted((run / "checkpoints").glob("step=*"))] == [3, 6, 9, 12, 13]


def test_whatever_an_objective_asks_is_counted_and_a_resumed_run_counts_on(train):
    asking = ("--model.objective", "tests.trainer.test_cost.Asking")
    run, lines = train(*asking, steps=5)
    assert counts(lines) == {2: 32, 4: 64, 5: 80}  # 8 samples, and twice 4
    part, _ = train(*asking, "--checkpoints.every", "1", steps=3)
    _, lines = train(*asking, out=part, steps=5)
    assert counts(lines) == {2: 32, 3: 48, 4: 64, 5: 80}
    assert teacher.read(teacher.newest(part))["evaluations"] == teacher.read(teacher.newest(run))["evaluations"] == 80


def test_a_run_whose_beginning_was_not_counted_tells_no_count(train):
    run, _ = train(steps=1)
    path = teacher.newest(run)
    checkpoint = teacher.read(path)
    del checkpoint["evaluations"]
    torch.save(checkpoint, path)
    _, lines = train(out=run, steps=4)
    assert [line["step"] for line in lines if "evaluations" in line] == [1]
    assert teacher.read(teacher.newest(run))["evaluations"] is None


@pytest.mark.parametrize(("sampler", "guidance", "each"), [("DDIM", 1.0, 3), ("Heun", 2.0, 10)])
def test_a_pair_set_says_what_it_cost(train, tmp_path, spent, sampler, guidance, each):
    run, _ = train(steps=1)
    before = spent()
    collect(run, tmp_path / "pairs", pairs=10, steps=3, sampler=sampler, guidance=guidance, shard=8, batch=8)
    assert PairSet(tmp_path / "pairs").manifest["evaluations"] == spent() - before == 10 * each


def test_a_pipeline_sums_up_what_its_stages_cost(tmp_path):
    for folder in ("teacher", "pairs", "latents", "autoencoder"):
        (tmp_path / folder).mkdir()
    lines = [{"step": n, "loss": 1.0, "evaluations": 8 * n} for n in (1, 2)]
    held = {"step": 2, "heldout_loss": 1.0}
    (tmp_path / "teacher" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, held)))
    (tmp_path / "autoencoder" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    write_json(tmp_path / "pairs" / "manifest.json", {"kind": "pairs", "evaluations": 100})
    write_json(tmp_path / "latents" / "manifest.json", {"kind": "latents"})
    assert cost(tmp_path) == {"evaluations": {"pairs": 100, "teacher": 16}, "total": 116}
    (tmp_path / "teacher" / "checkpoints").mkdir()
    (tmp_path / "teacher" / "checkpoints" / "step=000000002.ckpt").touch()
    write_json(tmp_path / "teacher" / "config.yaml", {"metrics": {"every": 20}, "trainer": {"max_steps": 2}})
    assert cost(tmp_path)["total"] == 116
    sparse = "".join(json.dumps({"step": n, "loss": 1.0, "evaluations": 1}) + "\n" for n in (4, 8))  # every 4, then every 3
    (tmp_path / "pairs" / "metrics.jsonl").write_text(sparse)
    (tmp_path / "pairs" / "checkpoints").mkdir()
    (tmp_path / "pairs" / "checkpoints" / "step=000000010.ckpt").touch()
    write_json(tmp_path / "pairs" / "config.yaml", {"metrics": {"every": 3}, "trainer": {"max_steps": 20}})
    assert cost(tmp_path)["evaluations"]["pairs"] == 1
    shutil.rmtree(tmp_path / "pairs" / "checkpoints")
    (tmp_path / "pairs" / "metrics.jsonl").unlink()
    (tmp_path / "teacher" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(ValueError, match="ends at step 1, step=000000002.ckpt is newer"):
        cost(tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    write_json(tmp_path / "pairs" / "manifest.json", {"kind": "pairs", "evaluations": -1})
    with pytest.raises(ValueError, match="evaluations: is -1, wanted a whole number"):
        cost(tmp_path)
