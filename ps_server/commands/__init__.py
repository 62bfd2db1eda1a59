"""The commands of `ps-server`: their flags, and what they do. Flags load little, so that `--help` is there at once."""
