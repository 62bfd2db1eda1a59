"""What runs servers and workers: processes on this machine, or a Ray cluster."""
