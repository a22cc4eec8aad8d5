"""Training: the training step, objectives, callbacks, and the jobs around them."""
