"""Programs that measure what the documentation claims; `make bench-...` runs them. Not part of the wheel."""
