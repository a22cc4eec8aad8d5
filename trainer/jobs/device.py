"""Where a verb of one process computes. It imports little, so that `rectify sample` starts soon."""

import torch

# The last bits of a sum over 3 threads differ from those over 1, 2 and 4.
MAX_CPU_THREADS = 2


def choose_device() -> torch.device:
    """Return the GPU if there is one, else the CPU with results that are the same on every CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    limit_cpu_threads()
    return torch.device("cpu")


def limit_cpu_threads() -> None:
    """Make results on the CPU independent of its number of cores."""
    torch.set_num_threads(min(MAX_CPU_THREADS, torch.get_num_threads()))
