"""Objectives that differentiate the network forward, or train a network too, in two processes."""

import subprocess
import sys

import pytest
import torch

from tests.distributed.runs import equal, final_state
from tests.helpers.training import config_words, study_config

CONFIGS = ["meanflow", "distribution"]
DISTRIBUTION = config_words(study_config("digits", "distribution"))
RANK_PROGRAM = """
import sys
import torch, torch.distributed as dist
from deploy.fit import begin, build, import_components
from trainer.callbacks.ema import to_full
import_components()
cli = build(sys.argv[2:])
begin(cli)
weights = [p for p in cli.model.parameters() if p.requires_grad]
gradients = [p.grad for p in weights]
parts = [torch.cat([to_full(v).detach().flatten() for v in part]) for part in (weights, gradients)]
state = torch.stack(parts)
if dist.is_initialized():
    ranks = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, state)
    assert len(ranks) == 2 and torch.equal(*ranks), "the ranks differ"
if cli.trainer.is_global_zero:
    torch.save(state, sys.argv[1])
"""


@pytest.fixture(scope="module")
def descend(workspace, tmp_path_factory):
    """Return a function that makes six steps of plain gradient descent.

    It returns the weights and the last gradients, of shape (2, N).
    """
    folder = tmp_path_factory.mktemp("objectives")
    program = folder / "ranks.py"
    program.write_text(RANK_PROGRAM)

    def run(config, strategy="auto"):
        out = folder / f"{config}-{strategy}"
        processes = 1 if strategy == "auto" else 2
        words = (
            *(*config_words(study_config("digits", config)), "--out", out),
            *("--trainer.max_steps", 6, "--trainer.logger", "false"),
            *("--optimizer", "SGD", "--optimizer.lr", 0.1, "--data.batch", 64),
            *("--trainer.devices", processes, "--trainer.strategy", strategy),
        )
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        launcher = torchrun if processes > 1 else ()
        command = (sys.executable, *launcher, program, f"{out}.pt", *words)
        ended = subprocess.run(
            [str(word) for word in command],
            cwd=workspace.path,
            env=workspace.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr
        return torch.load(f"{out}.pt", weights_only=True)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_make_the_same_gradients_and_weights(descend, config, request):
    """The two ranks are equal bit for bit, and equal to one process up to rounding.

    They are replicated (ddp) or, with --long, sharded (fsdp2).
    """
    one = descend(config)
    largest = one[1].abs().max().item()
    assert largest > 1e-3
    strategies = ["ddp"]
    if request.config.getoption("--long"):
        strategies.append("fsdp2")
    for strategy in strategies:
        two = descend(config, strategy)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def distribution_states(workspace, tmp_path_factory):
    """Return the states of a run after steps 3, 5 and 8, and after 8 uninterrupted steps.

    The student is trained in one step of five, and not between steps 3 and 5.
    """
    folder = tmp_path_factory.mktemp("distribution")

    def train(name, steps):
        workspace.rectify(
            *("fit", *DISTRIBUTION, "--out", folder / name),
            *("--trainer.max_steps", steps, "--trainer.logger", "false"),
            *("--model.objective.init_args.fake_rate", "2", "--data.batch", "32"),
            *("--checkpoints.every", "3"),
        )
        return final_state(folder / name, steps)

    states = {"step 5": train("resumed", 5)}
    states["step 3"] = final_state(folder / "resumed", 3)
    states["step 8"] = train("resumed", 8)
    states["uninterrupted"] = train("uninterrupted", 8)
    return states


def test_a_run_that_trains_a_fake_network_resumes_exactly(distribution_states):
    assert equal(distribution_states["step 8"], distribution_states["uninterrupted"])


def test_between_updates_of_the_student_only_the_fake_network_changes(distribution_states):
    early = distribution_states["step 3"]["state_dict"]
    later = distribution_states["step 5"]["state_dict"]
    changed = [key for key, value in later.items() if not torch.equal(value, early[key])]
    assert changed
    assert all(key.startswith("networks.fake.") for key in changed)


def test_the_fake_network_is_saved_and_the_teacher_is_not(distribution_states):
    keys = distribution_states["step 8"]["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"denoiser", "networks"}


def test_only_the_student_is_averaged(distribution_states):
    state = distribution_states["step 8"]
    student = {key for key in state["state_dict"] if key.startswith("denoiser.")}
    assert {f"denoiser.{key}" for key in state["ema"]} == student


def test_the_fake_network_has_a_learning_rate_that_is_a_multiple(distribution_states):
    student, fake = distribution_states["step 8"]["optimizer_states"][0]["param_groups"]
    assert fake["lr"] == pytest.approx(2 * student["lr"])
    assert len(fake["params"]) == len(student["params"])
