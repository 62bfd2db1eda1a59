"""Studies: what a whole training gives, played in one process with the server's own arithmetic."""
