"""The contract between workers and parameter server: messages, flat layout, errors. Imports neither room."""
