"""Two processes that resume: the warm-up's rates, a changed setting, an older checkpoint."""

from math import cos, pi

import pytest

from models.checkpoint import read_checkpoint
from tests.helpers.training import fit_words, small_config, spec

RATE = 0.01
WARMUP = 3
STEPS = 8
FLOOR = 0.1


def rate_after(steps: int) -> float:
    """Return the learning rate of the next step."""
    if steps < WARMUP:
        return RATE * (steps + 1) / WARMUP
    progress = min(1.0, (steps - WARMUP) / (STEPS - WARMUP))
    return RATE * (FLOOR + (1 - FLOOR) * (1 + cos(pi * progress)) / 2)


def rates(run) -> dict[int, float]:
    """Return the learning rate in each checkpoint of a run, by step."""
    found = {}
    for path in (run / "checkpoints").glob("step=*.ckpt"):
        checkpoint = read_checkpoint(path, resume=True)
        ((group,),) = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        found[checkpoint["global_step"]] = group["lr"]
    return found


@pytest.mark.slow
def test_a_run_on_two_processes_warms_up_is_changed_and_goes_back(workspace, tmp_path):
    """Sharded, then not; what is new is shown in one line for both."""
    config = small_config(
        spec("Plane", distribution="two_moons"),
        net=spec("models.nets.mlp.MLP", width=16, depth=1),
        lr=RATE,
    )
    arguments = {"warmup": WARMUP, "decay": "cosine", "floor": FLOOR, "steps": STEPS}
    config["lr_scheduler"] = spec("WarmUp", **arguments)
    config["trainer"]["callbacks"] = [spec("EMA", decay=0.5)]
    config["checkpoints"] = {"every": 1, "keep": 99}
    run = tmp_path / "run"

    def words(steps, *more):
        return ("spread", "--processes", 2, "--", *fit_words(config, run, *more, steps=steps))

    # in the warm-up, then in the decay and after its end
    sharded = ("--trainer.strategy", "fsdp2")
    workspace.rectify(*words(2, *sharded))
    workspace.rectify(*words(STEPS + 1, *sharded))
    expected = {step: pytest.approx(rate_after(step)) for step in range(1, STEPS + 2)}
    assert rates(run) == expected

    # a new learning rate, from an older checkpoint
    older = run / "checkpoints/step=000000004.ckpt"
    new = ("--optimizer.lr", 10 * RATE, "--resume", older, "--override")
    shown = workspace.rectify(*words(6, *new)).stderr
    assert shown.count("optimizer.lr is 0.1, it was 0.01") == 1
    expected |= {step: pytest.approx(10 * rate_after(step)) for step in (5, 6)}
    assert rates(run) == {step: expected[step] for step in range(1, 7)}
