"""Version 1 of the protocol: generated from parameter_server.proto by ``make proto``."""
