"""What reading a checkpoint leaves out, and how much memory it takes."""

import subprocess
import sys

import pytest
import torch

from models.checkpoint import newest_checkpoint, read_checkpoint
from models.condition import Unconditional
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.helpers.teachers import save_teacher, small_denoiser

READ = """
import resource, sys
from models.checkpoint import load_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

load_checkpoint(sys.argv[1])  # imports what it needs
before = peak()
model = load_checkpoint(sys.argv[2])
print((peak() - before) / sum(value.nbytes for value in model.denoiser.state_dict().values()))
"""


@pytest.fixture
def run_with_moments(tmp_path):
    """Return a function that writes a run with averages and an optimizer's moments."""

    def write(name, denoiser):
        weights = dict(denoiser.state_dict())
        run = save_teacher(tmp_path / name, denoiser, Unconditional(), averaged=True)
        path = newest_checkpoint(run)
        checkpoint = torch.load(path, weights_only=True)
        moments = {key: torch.rand_like(value) for key, value in weights.items()}
        squares = {key: torch.rand_like(value) for key, value in weights.items()}
        checkpoint["optimizer_states"] = [moments, squares]
        torch.save(checkpoint, path)
        return run

    return write


def test_the_state_of_the_optimizer_is_read_to_resume_alone(run_with_moments):
    path = newest_checkpoint(run_with_moments("run", small_denoiser(classes=0)))
    assert "optimizer_states" in read_checkpoint(path, resume=True)
    assert "optimizer_states" not in read_checkpoint(path)


def test_loading_takes_the_memory_of_two_networks(run_with_moments):
    """One is the network, the other the part of the file that its weights are copied from."""
    small = run_with_moments("small", small_denoiser(classes=0))
    net = DiT(size=8, width=512, depth=4, heads=8)
    large = run_with_moments("large", Denoiser(net, Linear(), Velocity()))
    words = [sys.executable, "-c", READ, str(small), str(large)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.3
