"""Guards around the process: forks, missing threads, and one thread at a time."""
