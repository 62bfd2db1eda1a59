"""Arrays and their names: nested dictionaries, raw bytes, initial values."""
