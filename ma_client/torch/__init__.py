"""The optimizer, and what it has to know about torch."""
