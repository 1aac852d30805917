"""Recipes and cluster files: sections, merging, and classes by their registered names."""
