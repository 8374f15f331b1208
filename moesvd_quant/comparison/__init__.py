"""Several recipes side by side on one model."""
