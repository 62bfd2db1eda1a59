"""Every rule of the server, pure: events and the time in, decisions out. No I/O, no numpy."""
