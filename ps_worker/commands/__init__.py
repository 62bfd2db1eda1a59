"""What the commands share: signals, extras that are missing, and how a script is run."""
