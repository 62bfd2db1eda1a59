"""The ways for a push's bytes, one file each."""
