"""Models behind an interface that clients know."""
