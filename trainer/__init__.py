"""How it learns: the training step, objectives, time laws, callbacks, and the jobs around them."""
