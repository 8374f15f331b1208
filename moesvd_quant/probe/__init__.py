"""What a model can bear, found out before anything is compressed."""
