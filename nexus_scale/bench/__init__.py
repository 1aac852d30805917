"""Comparisons with other implementations, side by side in one run."""
