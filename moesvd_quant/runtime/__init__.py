"""What ships into checkpoints: modules, formats and layouts that need torch and transformers alone."""

# First of all, so that any module here can be imported first: transformers' auto classes register it when they load.
from . import modeling_moesvd as modeling_moesvd
