"""The parameter server: keeps the center variables and averages the workers' pushes. Needs numpy, not torch."""
