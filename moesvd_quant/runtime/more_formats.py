"""Formats from outside the package. In a checkpoint, this file has the source of those that the checkpoint uses."""

MORE: tuple = ()
