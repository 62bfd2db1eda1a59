"""Torch's tensors and files as numpy arrays."""
