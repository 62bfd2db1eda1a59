"""This worker at the servers of its job: one server, all servers, initialization, recovery."""
