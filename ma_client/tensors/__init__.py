"""Torch's tensors as numpy arrays, and which of them cannot be averaged."""
