"""Recipes and cluster files: their sections, how they merge, and classes by their registered names."""
