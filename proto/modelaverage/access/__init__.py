"""How clients and servers trust each other: channels, TLS, tokens, and why trust fails."""
