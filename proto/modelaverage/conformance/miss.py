"""What a case raises when the client does something wrong."""

from __future__ import annotations

__all__ = ["Miss", "check", "short"]

_SHOWN_CHARACTERS = 300


class Miss(Exception):  # noqa: N818 - it is a finding, not an error
    """The client failed a case.

    Args:
        expected: what the client should have done.
        came: what it did.
    """

    def __init__(self, expected: str, came: str) -> None:
        super().__init__(f"expected {expected}; got {came}")
        self.expected = expected
        self.came = came


def check(what: str, came: object, expected: object) -> None:
    """Raises Miss unless both are equal."""
    if came != expected:
        raise Miss(f"{what} {short(expected)}", short(came))


def short(value: object) -> str:
    """The value for people; the middle of a long one is left out."""
    text = str(value)
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"
