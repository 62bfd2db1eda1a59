"""The server's edge to the network: roles, certificates, health, metrics."""
