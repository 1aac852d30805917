"""Denoising networks for images: `forward(x, t, cond) -> y`."""
