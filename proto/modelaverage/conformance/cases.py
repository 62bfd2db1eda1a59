"""All cases, in the order of the table."""

from __future__ import annotations

from modelaverage.conformance import compression, layouts, refusals, replies, retries, rounds
from modelaverage.conformance.case import Case, registered

__all__ = ["CASES"]

_ROOMS = (layouts, rounds, compression, retries, replies, refusals)  # importing them has added their cases to the list

CASES: tuple[Case, ...] = tuple(one for room in _ROOMS for one in registered if one.play.__module__ == room.__name__)
