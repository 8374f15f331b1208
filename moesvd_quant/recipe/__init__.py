"""Recipes: YAML, checked at once, with file and line of what is wrong. Imports no torch."""
