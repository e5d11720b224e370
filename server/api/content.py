"""The contents of a request. JSON strings and parts come in; texts, images and videos come out."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypeAliasType

from jaxrank.media.images import Kind
from jaxrank.server.errors import BadRequest, Invalid
from jaxrank.server.media.loading import MediaPart

HOLDS = ("text", "content", "image", "image_url", "video", "video_url")
"""Fields of a part. One of them is needed."""

# The names of these types are the names of the schemas that schemas.py writes.


class Part(BaseModel):
    """A piece of a query or document: {"type": "text", "text": "..."} or {"text": "..."}; for models that see also
    {"type": "image_url", "image_url": {"url": "..."}}, {"image": "..."}, the same for video, or {"content": [parts]}.
    """

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    text: str | None = None


Content = TypeAliasType("Content", str | Part | list[Part])

FilledContent = TypeAliasType("FilledContent", str | Part | list[Part])
"""The same, but refused if it is empty."""

Side = str | list[str | MediaPart]
"""A query or document: one text, or texts and media in their order."""

TEXTS = 'a string, an object {"text": "..."} or an array of {"type": "text", "text": "..."} parts'
MEDIA = (
    f'{TEXTS}, {{"type": "image_url", "image_url": {{"url": "..."}}}} parts or '
    '{"type": "video_url", "video_url": {"url": "..."}} parts'
)

_OTHER_MEDIA = {"image_embeds", "audio", "audio_url", "input_audio"}
_KINDS: dict[str, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


def allowed(sees: bool) -> str:
    """Return the phrase for messages that says what a content may be."""
    return MEDIA if sees else TEXTS


def read(content: Content, place: str, sees: bool) -> Side:
    """Return the content of one query or document.

    Args:
        content: The content as it was sent.
        place: Its place in the request, for messages.
        sees: Whether the model sees images and videos.

    Raises:
        BadRequest: It has media that the model cannot see, or text that is not valid Unicode.
        Invalid: A part has another form than the allowed ones.
    """
    if isinstance(content, str):
        return _checked(content, place)
    pieces = [_piece(part, place, sees) for part in _parts(content, place, sees)]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    return "".join(texts) if len(texts) == len(pieces) else pieces


def media_of(side: Side, place: str) -> list[tuple[str, MediaPart]]:
    """Return the images and videos of a content, each with its own place, such as documents[2][1]."""
    pieces = side if isinstance(side, list) else []
    return [(f"{place}[{i}]", piece) for i, piece in enumerate(pieces) if isinstance(piece, MediaPart)]


def without_payloads(value: Any) -> Any:
    """Return a JSON value as it was sent, without the contents of data: URLs.

    Only the beginning of a data: URL is kept. Invalid Unicode is replaced, which occurs only in fields that the server
    does not read.
    """
    if isinstance(value, str):
        text = f"{value[: value.find(',') + 1 or 32][:64]}..." if value[:5].lower() == "data:" else value
        return text if text.isascii() else text.encode(errors="replace").decode()
    if isinstance(value, list):
        return [without_payloads(one) for one in value]
    if isinstance(value, dict):
        return {without_payloads(key): without_payloads(one) for key, one in value.items()}
    return value


def _parts(content: Part | list[Part], place: str, sees: bool) -> list[Part]:
    if isinstance(content, list):
        return content
    inner = (content.model_extra or {}).get("content")
    if content.text is not None or not isinstance(inner, list):
        return [content]
    try:
        return [Part.model_validate(one) for one in inner]
    except ValueError:
        raise Invalid(f"{place} must be {allowed(sees)}; got other things in its content.") from None


def _piece(part: Part, place: str, sees: bool) -> str | MediaPart:
    """Return the text of one part, or its image or video.

    Media that a model cannot see are refused, not left out. Otherwise the score would be for a different content.

    Raises:
        BadRequest: The model cannot see the part, or its text is not valid Unicode.
        Invalid: The part has another form than the allowed ones.
    """
    extra = part.model_extra or {}
    names = [name for name in _KINDS if name in extra and extra[name] is not None]
    if not sees and (names or part.type in _KINDS):
        raise BadRequest(f"{place} holds an image, video or sound, and this model takes text only.")
    if part.type in _OTHER_MEDIA or not _OTHER_MEDIA.isdisjoint(extra):
        seen = "texts, images and videos" if sees else "text"
        raise BadRequest(f"{place} holds an image, video or sound, and this model takes {seen} only.")
    if part.text is not None and part.type in (None, "text") and not names:
        return _checked(part.text, place)
    if len(names) == 1 and part.text is None and (part.type is None or _KINDS.get(part.type) == _KINDS[names[0]]):
        kind, source = _KINDS[names[0]], _source(extra[names[0]])
        if isinstance(source, str) or (source and kind == "video"):
            return MediaPart(kind, source)
    raise Invalid(f"{place} must be {allowed(sees)}; got a part without text or of another type.")


def _source(value: Any) -> str | tuple[str, ...]:
    """Return the address in a part, or the addresses of a video's frames. It is () if there is none."""
    value = value.get("url") if isinstance(value, dict) else value
    if isinstance(value, list):
        frames = [_source(one) for one in cast(list[Any], value)]
        return tuple(one for one in frames if isinstance(one, str)) if all(isinstance(f, str) for f in frames) else ()
    return value if isinstance(value, str) else ()


def _checked(text: str, place: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest(
                f"{place} contains a lone surrogate (invalid Unicode). "
                "Escapes from \\ud800 to \\udfff must come in pairs."
            ) from None
    return text
