"""The contract between workers and parameter server: messages, flat layout, errors. Imports neither room."""

__version__ = "0.2.0.dev0"
