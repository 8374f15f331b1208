"""Perplexity, memory, tables and plots of any set of checkpoints."""
