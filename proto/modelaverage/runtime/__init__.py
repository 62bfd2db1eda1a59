"""What a process needs besides the contract: allocator and channel settings, shared memory, sockets, logs."""
