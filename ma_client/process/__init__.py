"""What a process allows: threads, forks, one thread at a time."""
