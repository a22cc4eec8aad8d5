"""Objectives that differentiate the network forward, or own networks, on real processes: as a single process does it."""

import subprocess
import sys

import pytest
import torch

from tests.distributed.runs import equal, final

CONFIGS = ["meanflow", "distribution"]
RANKS = """
import sys
import torch, torch.distributed as dist
from deploy.fit import begin, build, import_components
from trainer.callbacks.ema import full
import_components()
cli = build(sys.argv[2:])
begin(cli)
there = [p for p in cli.model.parameters() if p.requires_grad]
mine = torch.stack([torch.cat([full(v).detach().flatten() for v in part]) for part in (there, [p.grad for p in there])])
if dist.is_initialized():
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    assert len(ranks) == 2 and torch.equal(*ranks), "the ranks differ"
if cli.trainer.is_global_zero:
    torch.save(mine, sys.argv[1])
"""


@pytest.fixture(scope="module")
def descend(workspace, tmp_path_factory):
    """Return the weights and the last gradients, (2, N), after six steps of plain gradient descent."""
    place = tmp_path_factory.mktemp("objectives")
    (place / "ranks.py").write_text(RANKS)

    def run(config, strategy="auto"):
        out, processes = place / f"{config}-{strategy}", 1 if strategy == "auto" else 2
        words = ["--config", f"configs/digits/{config}.yaml", "--out", out, "--trainer.max_steps", 6, "--trainer.logger", "false"]
        words += ["--optimizer", "SGD", "--optimizer.lr", 0.1, "--data.batch", 64]
        words += ["--trainer.devices", processes, "--trainer.strategy", strategy]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes > 1 else []
        command = [str(word) for word in (sys.executable, *launcher, place / "ranks.py", f"{out}.pt", *words)]
        there = {"cwd": workspace.path, "env": workspace.environment()}
        done = subprocess.run(command, **there, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(f"{out}.pt", weights_only=True)

    return run


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_make_the_same_gradients_and_weights(descend, config, request):
    """The ranks bit for bit, and to rounding what one process makes, replicated (ddp) or (with --long) sharded (fsdp2)."""
    one = descend(config)
    largest = one[1].abs().max().item()
    assert largest > 1e-3
    for strategy in ("ddp", "fsdp2") if request.config.getoption("--long") else ("ddp",):
        torch.testing.assert_close(descend(config, strategy), one, rtol=1e-5, atol=1e-5 * largest)


def test_a_run_whose_objective_owns_a_network_resumes_exactly(workspace, tmp_path):
    """The fake is in checkpoints, the teacher is not; the student rests in four steps of five, and only it is averaged."""
    own = ("--model.objective.init_args.rate", "2", "--data.batch", "32", "--trainer.logger", "false", "--checkpoints.every", "3")

    def fit(name, steps):
        words = ("--config", "configs/digits/distribution.yaml", "--out", tmp_path / name, "--trainer.max_steps", steps)
        workspace.rectify("fit", *words, *own)
        return final(tmp_path / name, steps)

    later, early, end = fit("resumed", 5), final(tmp_path / "resumed", 3), fit("resumed", 8)
    assert equal(end, fit("undisturbed", 8))
    moved = {key for key, value in later["state_dict"].items() if not torch.equal(value, early["state_dict"][key])}
    assert moved and all(key.startswith("networks.fake.") for key in moved)
    assert {key.split(".")[0] for key in end["state_dict"]} == {"denoiser", "networks"}
    assert {f"denoiser.{key}" for key in end["ema"]} == {key for key in end["state_dict"] if key.startswith("denoiser.")}
    student, fake = end["optimizer_states"][0]["param_groups"]
    assert fake["lr"] == pytest.approx(2 * student["lr"]) and len(fake["params"]) == len(student["params"])
