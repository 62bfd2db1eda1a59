"""What stands between the network and the calls: roles, certificates, health, metrics."""
