"""A run and conditions -> samples."""
