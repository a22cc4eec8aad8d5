"""`python -m deploy` is `rectify`: what torchrun can start (`torchrun --nproc-per-node 2 -m deploy collect ...`)."""

import sys

from deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
