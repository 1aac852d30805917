"""Discriminators: `forward(x) -> one (logits, features) for each scale`."""
