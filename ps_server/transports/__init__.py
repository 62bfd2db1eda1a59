"""Transports: how the bytes of a push travel. One file each."""
