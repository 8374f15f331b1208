"""Shipped recipes, one YAML file each; `moesvd ls` lists them."""
