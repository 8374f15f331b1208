"""Mechanisms that know no model: limits of memory, files that are whole or absent, lazy sequences, workers."""
