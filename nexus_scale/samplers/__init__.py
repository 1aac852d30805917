"""One file per sampler; each gets a callable and never sees a network."""
