"""What a process needs from the machine: allocator and channel settings, shared memory, sockets, logs, deadlines."""
