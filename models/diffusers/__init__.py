"""Everything that rectify knows about diffusers' networks, schedulers and pipelines."""
