"""The digits, and a whole run of them to look at."""
