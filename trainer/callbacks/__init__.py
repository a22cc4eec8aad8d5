"""What a run does beside its steps: average, save, tell."""
