"""The JSON schemas of queries and documents: what content.py reads, and request.py makes lists of.

Written by hand, since they say more than types can: what a model sees, what may be empty, what parts may be within.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_SOME_TEXT: Schema = {"properties": {"text": {"pattern": r"\S"}}}
"""Of a part that is not blank; one without a text is an image or video."""


def content_schemas(sees: bool, most: int) -> dict[str, Schema]:
    """JSON schemas by name, for a model that sees, or not, and requests of at most so many documents."""
    part = _media_parts() if sees else {"Part": _text_part("A piece of a query or document.")}
    parts: Schema = {
        "type": "object",
        "description": "Several parts as one.",
        "required": ["content"],
        "properties": {"content": {"type": "array", "items": _ref("Part")}, "text": {"type": "null"}},
    }
    filled: list[Schema] = [
        {"type": "string", "pattern": r"\S"},
        {"allOf": [_ref("Part"), _SOME_TEXT]},
        {"allOf": [_ref("Parts"), {"properties": {"content": {"contains": _SOME_TEXT}}}]},
        {"type": "array", "items": _ref("Part"), "contains": _SOME_TEXT},
    ]
    content: list[Schema] = [{"type": "string"}, _ref("Part"), _ref("Parts"), {"type": "array", "items": _ref("Part")}]
    return part | {
        "Parts": parts,
        "Content": {"description": "A text, a part, or parts, whose texts are joined as they stand.", "anyOf": content},
        "FilledContent": {"description": "The same, not empty and not only white space.", "anyOf": filled},
        "Documents": _documents("Content", content[:3], most),
        "FilledDocuments": _documents("FilledContent", filled[:3], most),
    }


def _documents(each: str, lone: list[Schema], most: int) -> Schema:
    """lone: the forms in which one document alone may stand for a list of one."""
    several = {"type": "array", "items": _ref(each), "minItems": 1, "maxItems": most}
    return {
        "description": "At least one document, each one content; or a lone one, no list.",
        "anyOf": [several, *lone],
    }


def _text_part(description: str) -> Schema:
    kind = {"enum": ["text", None]}
    return {
        "type": "object",
        "description": description,
        "required": ["text"],
        "properties": {"type": kind, "text": {"type": "string"}},
    }


def _media_parts() -> dict[str, Schema]:
    address: Schema = {
        "type": "string",
        "format": "uri",
        "description": "An http or https address, or data:TYPE;base64,DATA.",
    }
    several = {"type": "array", "items": _within(address), "minItems": 1, "description": "A video's frames."}
    return {
        "Part": {
            "description": "A piece of a query or document.",
            "anyOf": [_ref("TextPart"), _ref("ImagePart"), _ref("VideoPart")],
        },
        "TextPart": _text_part("A text."),
        "ImagePart": _media_part("An image", "image", _within(address)),
        "VideoPart": _media_part("A video", "video", {"anyOf": [*_within(address)["anyOf"], several]}),
    }


def _within(address: Schema) -> Schema:
    """An address alone, or in an object."""
    return {"anyOf": [address, {"type": "object", "required": ["url"], "properties": {"url": address}}]}


def _media_part(what: str, name: str, source: Schema) -> Schema:
    """name: of the field; with _url it has another one."""
    properties = {"type": {"enum": [f"{name}_url", name, None]}, "text": {"type": "null"}}
    either = [
        {"required": [field], "properties": properties | {field: source, other: {"type": "null"}}}
        for field, other in ((f"{name}_url", name), (name, f"{name}_url"))
    ]
    return {"type": "object", "description": f"{what}, under either name.", "anyOf": either}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
