"""The cluster: its servers and workers, the sources that describe it, and task indexes."""
