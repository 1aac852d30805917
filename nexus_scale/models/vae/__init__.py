"""Autoencoders: `forward(x, eps) -> (x_hat, mean, logvar)`, `encode`, `decode`."""
