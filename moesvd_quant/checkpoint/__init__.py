"""Checkpoints: their layout and exact bytes, how one is finished, how one is verified."""
