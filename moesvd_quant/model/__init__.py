"""Models: their experts, their files, the walk through them, and what ships into checkpoints."""

# First of all, so that any module here can be imported first: transformers' auto classes register it when they load.
from . import modeling_moesvd as modeling_moesvd
