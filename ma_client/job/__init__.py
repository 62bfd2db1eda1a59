"""A worker's use of the servers of its job: one server, all servers, initialization, recovery."""
