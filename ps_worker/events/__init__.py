"""Progress events of the built-in workload, and their recipients."""
