"""Who is who in a job: specifications, environments, task indexes."""
