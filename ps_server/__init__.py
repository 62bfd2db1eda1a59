"""The parameter server: keeps the center variables and averages the workers' pushes. Needs numpy, not torch."""

from modelaverage import __version__ as __version__
