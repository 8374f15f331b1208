"""Checkpoints for other software."""
