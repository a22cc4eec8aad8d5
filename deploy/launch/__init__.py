"""Launching pipelines on engines: this host, or Slurm. One file per engine."""
