"""Models: their folders and files, their experts, and the walk through their layers."""
