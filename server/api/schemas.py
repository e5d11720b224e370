"""The JSON schemas of queries and documents, which content.py reads and request.py puts into lists.

They are written by hand, because types cannot say all of it: what a model sees, what may be empty, what parts may hold.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_SOME_TEXT: Schema = {"properties": {"text": {"pattern": r"\S"}}}
"""A part that is not blank. A part without a text is an image or video."""


def content_schemas(sees: bool, most: int) -> dict[str, Schema]:
    """Return JSON schemas by name.

    Args:
        sees: Whether the model sees images and videos.
        most: Most documents in one request.
    """
    part = _media_parts() if sees else {"Part": _text_part("A piece of a query or document.")}
    parts: Schema = {
        "type": "object",
        "description": "Several parts that form one content.",
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
        "Content": {"description": "A text, a part, or parts, whose texts are joined unchanged.", "anyOf": content},
        "FilledContent": {"description": "The same, but neither empty nor only white space.", "anyOf": filled},
        "Documents": _documents("Content", content[:3], most),
        "FilledDocuments": _documents("FilledContent", filled[:3], most),
    }


def _documents(each: str, lone: list[Schema], most: int) -> Schema:
    """Return the schema of a list of documents.

    Args:
        each: The name of one document's schema.
        lone: The forms in which one document may stand for a list of one.
        most: Most documents.
    """
    several = {"type": "array", "items": _ref(each), "minItems": 1, "maxItems": most}
    return {
        "description": "At least one document, each of which is one content; or a single document without a list.",
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
    """Return the schema of an address, either alone or in an object."""
    return {"anyOf": [address, {"type": "object", "required": ["url"], "properties": {"url": address}}]}


def _media_part(what: str, name: str, source: Schema) -> Schema:
    """Return the schema of a part with an image or video.

    Args:
        what: The words for it in the description.
        name: The name of the field. The name with _url is accepted too.
        source: The schema of the field.
    """
    properties = {"type": {"enum": [f"{name}_url", name, None]}, "text": {"type": "null"}}
    either = [
        {"required": [field], "properties": properties | {field: source, other: {"type": "null"}}}
        for field, other in ((f"{name}_url", name), (name, f"{name}_url"))
    ]
    return {"type": "object", "description": f"{what}, under either name.", "anyOf": either}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
