"""Checkpoints of diffusers and transformers, in and out: the one door to both libraries."""
