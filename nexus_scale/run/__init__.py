"""A run's life: its folder, lock, resume, and what is installed around it."""
