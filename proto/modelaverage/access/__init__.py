"""Who may speak to whom: channels, TLS, tokens, and what is wrong when the two sides do not trust each other."""
