"""Files that are whole or not at all, text, the terminal, and what a run writes down beside its state."""
