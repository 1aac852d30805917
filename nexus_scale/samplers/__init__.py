"""One file per sampler; each gets a callable, never a network."""
