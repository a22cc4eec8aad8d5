"""Metrics of generated samples and of a denoiser's trajectories."""
