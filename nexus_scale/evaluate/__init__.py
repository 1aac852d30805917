"""Samples -> scores."""
