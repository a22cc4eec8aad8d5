"""Verbs that compute with trained networks: one file each, of its name, and what they share."""
