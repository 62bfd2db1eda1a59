"""What the machine gives and refuses: descriptors, memory, threads, connections."""
