"""The connection to one server, and the transports for a push's bytes."""
