"""One small module per training framework; each imports its framework and nothing else does."""
