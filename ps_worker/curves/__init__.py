"""Curves of a run: the loss that its workers report, over steps, seconds and megabytes."""
