"""A training under a monkey that kills and stops its processes at random, and the proof that nothing was lost."""
