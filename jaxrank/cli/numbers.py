"""Numbers on the command line."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """Parse a whole number of at least 1.

    Raises:
        ArgumentTypeError: The text is something else.
    """
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """Parse a finite number of seconds, 0 or more.

    Raises:
        ArgumentTypeError: The text is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, 0 or more")
    return value


def time_span(text: str) -> float:
    """Parse a finite number of seconds above 0.

    Raises:
        ArgumentTypeError: The text is something else.
    """
    if not seconds(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be more than 0 seconds")
    return seconds(text)
