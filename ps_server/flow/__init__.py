"""Calls and rounds in motion: carries out what the rules decide."""
