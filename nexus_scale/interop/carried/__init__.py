"""Files that an export carries: they run beside it in programs that do not have this project, and import nothing of it."""
