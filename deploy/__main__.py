"""`python -m deploy` is `rectify`, for torchrun: `torchrun --nproc-per-node 2 -m deploy ...`."""

import sys

from deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
