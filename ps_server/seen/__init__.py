"""What is known of workers and rounds. The status, the metrics and the log read it; no rule does."""
