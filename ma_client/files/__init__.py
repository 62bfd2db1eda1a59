"""Initial values of the center from a file."""
