"""Calls and rounds at work: carries out what the rules decide."""
