"""Jobs that torchrun spreads over processes: one file per verb of `rectify`."""
