"""Training steps held to a peak: how a batch is split and what is computed again."""
