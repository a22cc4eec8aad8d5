"""What is changed in Lightning, all in one place.

- `checkpoint_io`: checkpoints are written atomically and read without running code.
- `fast_loop`: a training step without Lightning's bookkeeping that such a step does not need.
- `fsdp`: sharded training with FSDP2, and sharded checkpoints that are written in the background.

Callbacks that only use Lightning's public interface are in `trainer.callbacks`.
"""
