"""Layers that several networks share; each parameter is tagged for the optimizer where it is created."""
