"""The error of a setting that the server cannot use. It stands alone, so that flags can be read without the server."""

from __future__ import annotations

__all__ = ["UnusableSettingError"]


class UnusableSettingError(Exception):
    """The server cannot do what a flag asks, such as listen on an address or write a file."""
