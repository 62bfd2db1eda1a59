"""The page of a server: what it shows, who may read it, and what hostile clients can do to it."""
