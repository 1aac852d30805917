"""From model space to what a person sees or hears."""
