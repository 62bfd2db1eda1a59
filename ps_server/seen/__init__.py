"""Observations of workers and rounds, for the status, the metrics and the log. No rule reads them."""
