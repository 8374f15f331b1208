"""Reading and writing of checkpoints: files that are whole or absent."""
