"""The server's rules as pure code: events and the time go in, decisions come out. No I/O, no numpy."""
