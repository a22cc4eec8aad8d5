"""The program: `rectify`, and `python -m deploy` for torchrun."""

import signal
import sys


def start() -> int:
    """Run the command, and return its exit code.

    Signals are blocked until `main` handles them, so that none is lost during the imports: the
    first process of a container ignores what it does not handle, any other one dies of it.
    """
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    from deploy.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
