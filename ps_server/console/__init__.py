"""Commands that are clients of a server: status, watch, export."""
