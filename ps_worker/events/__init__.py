"""What a run of the built-in workload tells of its progress, and who is told."""
