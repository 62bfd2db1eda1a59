"""Worker groups, on real processes with gloo."""
