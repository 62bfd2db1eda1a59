"""A training whose processes are killed and stopped at random, and a check that nothing was lost."""
