"""Noising processes of clean samples, shared by objectives and samplers."""
