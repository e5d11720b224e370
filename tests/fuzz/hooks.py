"""What `schemathesis run` is told beside a document (see run.py): what a JSON schema cannot say of requests, what the
server is lenient about, and a count of what was sent."""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs
import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.specs.openapi.checks import negative_data_rejection

SIDES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))
WRONG = {*range(400, 409), 413, 422, 431}
"""Statuses that refuse what is wrong with a request."""

counts: Counter[tuple[str, int]] = Counter()
lock = threading.Lock()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Mend what is valid by the schema, and not by what schemas cannot express.

    A deadline in X-Request-Timeout that is too short for any answer is rightly answered 504: it is made longer. Good
    bodies: the names in rank_fields must be those of the documents' fields; /score takes one query, or as many as
    documents; addresses must be those of images and videos, and no pair be shorter than those in it.
    """
    for name, value in (case.headers or {}).items():
        if name.lower() == "x-request-timeout":
            with contextlib.suppress(ValueError):
                if 0 < float(value) < 60:
                    case.headers[name] = "60"
    if case.meta is None or not case.meta.generation.mode.is_positive or not isinstance(case.body, dict):
        return
    body = with_media(case.body)
    if ";base64," in json.dumps(body):
        body["truncate_prompt_tokens"] = None
    if body.get("rank_fields"):
        body["rank_fields"] = ["text"]
    for left, right in SIDES:
        ours, theirs = body.get(left), body.get(right)
        if isinstance(ours, list) and len(ours) > 1:
            count = len(theirs) if isinstance(theirs, list) else 1
            body[left] = (ours * count)[: max(count, 1)]
    case.body = body


def with_media(value: Any) -> Any:
    """A JSON value with an image or video at each address in it."""
    if isinstance(value, list):
        return [with_media(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for name, inner in value.items():
        kind = name.removesuffix("_url")
        found[name] = addressed(inner, kind) if kind in ("image", "video") else with_media(inner)
    return found


def addressed(source: Any, kind: str) -> Any:
    """An address, in whatever form it stands."""
    if isinstance(source, dict):
        return {**source, "url": addressed(source.get("url"), kind)}
    if isinstance(source, list):
        return [addressed(one, "image") for one in source]
    return media(kind) if isinstance(source, str) else source


@functools.cache
def media(kind: str) -> str:
    """A data: address."""
    from tests.media import clip, encoded, photo

    content, name = (encoded(photo(32, 32, 0)), "image/png") if kind == "image" else (clip(30), "video/mp4")
    return f"data:{name};base64,{base64.b64encode(content).decode()}"


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    with lock:
        counts[case.operation.label, response.status_code] += 1


@atexit.register
def write_counts() -> None:
    """Where run.py said."""
    if path := os.environ.get("FUZZ_COUNTS"):
        rows = [[name, status, count] for (name, status), count in sorted(counts.items())]
        Path(path).write_text(json.dumps(rows))


@schemathesis.check
def refuses_but_for_spelling(context: Any, response: Any, case: Any) -> None:
    """schemathesis' negative_data_rejection, which takes 413 for a refusal too, and lets pass what is right but for its
    spelling: "5", 5.0 or true for a whole number, 0 or "yes" for a truth value. SGLang's and vLLM's servers read those,
    so that there are clients that send them; the documents do not advertise it."""
    try:
        negative_data_rejection(context, response, case)
    except AcceptedNegativeData:
        if response.status_code not in WRONG and not is_right_when_spelled(case):
            raise


def is_right_when_spelled(case: Any) -> bool:
    """Whether the body is valid with its numbers and truth values as JSON writes them."""
    if not isinstance(case.body, dict):
        return False
    validator, kinds = document(case.operation)
    body = {name: spelled(value, kinds.get(name, set())) for name, value in case.body.items()}
    return bool(validator.is_valid(body))


def document(operation: Any) -> tuple[Any, dict[str, set[str]]]:
    """The validator of an operation's bodies, and the types of fields by their names."""
    raw = operation.schema.raw_schema
    body = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]
    kinds: dict[str, set[str]] = {}
    for schema in raw["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            options = field.get("anyOf", [field])
            kinds.setdefault(name, set()).update(str(option.get("type")) for option in options)
            if False in field.get("enum", []):
                kinds[name].add("boolean")
    return jsonschema_rs.validator_for({"allOf": [body], "components": raw["components"]}), kinds


def spelled(value: Any, kinds: set[str]) -> Any:
    """The value as JSON writes it for one of these types."""
    if "boolean" in kinds and not isinstance(value, bool):
        words = {"0": False, "off": False, "f": False, "false": False, "n": False, "no": False}
        words |= {"1": True, "on": True, "t": True, "true": True, "y": True, "yes": True, "0.0": False, "1.0": True}
        return words.get(str(value).lower(), value)
    if "integer" in kinds and isinstance(value, str | float | bool):
        with contextlib.suppress(ValueError, OverflowError):
            return int(float(value))
    return value
