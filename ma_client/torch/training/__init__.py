"""One worker's training: what an optimizer and its hook do with the job."""
