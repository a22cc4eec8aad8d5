"""What is changed in Lightning, all in one place: see README.md.

Callbacks that only use Lightning's public interface are in `trainer.callbacks`.
"""
