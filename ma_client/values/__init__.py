"""Arrays and their names: nested dictionaries, and raw bytes."""
