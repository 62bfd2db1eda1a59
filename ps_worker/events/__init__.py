"""What servers and workers log, read by programs."""
