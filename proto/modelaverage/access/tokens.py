"""Tokens: shared secrets that calls carry in their metadata, and the files that hold them."""

from __future__ import annotations

import re
from pathlib import Path

from modelaverage.access.pem import read_file
from modelaverage.errors import SecurityError

__all__ = ["METADATA_KEY", "bearer", "check_token", "read_tokens", "token_of"]

METADATA_KEY = "authorization"
_SCHEME = "Bearer "
# RFC 6750's characters. The minimum of 16 is short enough for tests; `openssl rand -hex 32` makes 64.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}={0,2}")
_RULE = "16 to 512 letters, digits and ._~+/- (`openssl rand -hex 32` makes one)"


def check_token(token: str, where: str) -> str:
    """Returns the token. Raises SecurityError if it is malformed; the message names ``where`` it is, not the token."""
    if _TOKEN.fullmatch(token) is None:
        raise SecurityError(f"{where} is not a token: {_RULE}")
    return token


def read_tokens(path: Path) -> tuple[str, ...]:
    """The tokens in a file, one a line; empty lines and lines that begin with # are skipped.

    Raises:
        SecurityError: the file cannot be read, has no token, or has a line that is not a token.
    """
    try:
        text = read_file(path).decode("ascii")
    except UnicodeDecodeError:
        raise SecurityError(f"{path} has a character that a token cannot have; a token is {_RULE}") from None
    tokens = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line and not line.startswith("#"):
            tokens.append(check_token(line, f"line {number} of {path}"))
    if not tokens:
        raise SecurityError(f"{path} has no token; write one into it: {_RULE}")
    return tuple(tokens)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that carries the token."""
    return ((METADATA_KEY, _SCHEME + token),)


def token_of(value: str | bytes) -> str | None:
    """The token in a metadata value; None if the value uses another scheme."""
    text = value if isinstance(value, str) else value.decode("latin-1")
    # The scheme's name is not case-sensitive (RFC 9110).
    return text[len(_SCHEME) :] if text[: len(_SCHEME)].lower() == _SCHEME.lower() else None
