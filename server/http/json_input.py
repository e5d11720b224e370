"""JSON that strangers wrote: measured before it is parsed, because small bodies can hold millions of values."""

from __future__ import annotations

import json
from typing import Any

from jaxrank.server.errors import Malformed, TooLarge

MAX_DEPTH = 32
MAX_VALUES = 150_000
"""JSON of one thousand documents has a few thousand values. Parsing keeps Python's lock, so that the event loop stands
still meanwhile: 8 MB of nested arrays take four seconds, 150,000 values at most 40 ms."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def load_json(body: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """The value in a body of JSON. Raises Malformed or TooLarge.

    max_depth: arrays and objects within each other. max_values: of all arrays and objects together.
    """
    _check_shape(body, max_depth, max_values)
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Malformed(f"The body is not UTF-8: byte {error.start} is invalid. Send JSON in UTF-8.") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}.") from None
    except ValueError:  # whole numbers of thousands of digits
        raise Malformed("The body's JSON holds a number that is too long.") from None


def _check_shape(body: bytes, max_depth: int, max_values: int) -> None:
    """Raise for too much of either. What is no JSON may pass; the parser will refuse it."""
    many = TooLarge(f"The body's JSON has more than {max_values:,} values. Send less in one request.")
    # without escaped quotes, every second piece between quotes is outside of strings
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if plain.count(b'"') > 4 * max_values:  # a key and a string, two quotes each
        raise many
    outside = b"".join(plain.split(b'"')[::2])
    if outside.count(b",") + outside.count(b"[") + outside.count(b"{") > max_values:
        raise many
    depth = 0
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise Malformed(f"The body's JSON is nested too deeply; {max_depth} levels are allowed.")
