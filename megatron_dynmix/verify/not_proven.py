"""How a proof ends early, and how exact it is."""

TOLERANCE = 1e-12
"""Of recomputed numbers: the same bits on the same machine, a rounding apart on another."""


class NotProven(Exception):
    """Something does not agree; the message says where and what."""
