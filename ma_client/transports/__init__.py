"""The connection to one server, and the ways for a push's bytes."""
