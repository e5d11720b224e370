"""JSON from unknown senders. It is measured before it is parsed, because small bodies can hold millions of values."""

from __future__ import annotations

import json
from typing import Any

from jaxrank.server.errors import Malformed, TooLarge

MAX_DEPTH = 32
MAX_VALUES = 150_000
"""The JSON of one thousand documents has a few thousand values.

Parsing keeps Python's lock, so the event loop stands still meanwhile. 8 MB of nested arrays take four seconds; 150,000
values take at most 40 ms.
"""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def load_json(body: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """Return the value in a body of JSON.

    Args:
        body: The body, in UTF-8.
        max_depth: Most levels of nested arrays and objects.
        max_values: Most values of all arrays and objects together.

    Raises:
        Malformed: The body is not JSON in UTF-8, or is nested too deeply.
        TooLarge: The body has too many values.
    """
    _check_shape(body, max_depth, max_values)
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Malformed(f"The body is not UTF-8: byte {error.start} is invalid. Send JSON in UTF-8.") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from None
    except ValueError:  # an integer has thousands of digits
        raise Malformed("The body's JSON holds a number that is too long.") from None


def _check_shape(body: bytes, max_depth: int, max_values: int) -> None:
    """Check the depth and the number of values. A body that is not JSON may pass; the parser refuses it.

    Raises:
        Malformed: The body is nested too deeply.
        TooLarge: The body has too many values.
    """
    many = TooLarge(f"The body's JSON has more than {max_values:,} values. Send less in one request.")
    # without escaped quotes, every second piece between quotes is outside of a string
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if plain.count(b'"') > 4 * max_values:  # a key and a string have two quotes each
        raise many
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > max_values:
        raise many
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise Malformed(f"The body's JSON is nested too deeply; {max_depth} levels are allowed.")
