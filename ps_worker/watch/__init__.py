"""What a run says about itself: the servers' status, workers that others wait for, and the last line."""
