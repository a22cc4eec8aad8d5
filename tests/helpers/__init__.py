"""Shared by many tests: commands, refusals, training in this process, small teachers."""
