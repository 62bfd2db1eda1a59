"""Hostile input for every message handler of the server, a million and more an hour: `make fuzz`."""
