"""What becomes of every expert, decided before a weight is changed: choices, their bytes and errors, one allocation."""
