"""What a run says of itself while it goes on and at its end: servers asked, workers missed, and the last word."""
