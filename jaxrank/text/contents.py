"""Turns what Python programs give as a query or document into the parts of a prompt.

Texts, images and videos can come in many forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from jaxrank.errors import MediaError, RequestError
from jaxrank.media.images import Preprocessing
from jaxrank.media.patches import image_patches, video_patches
from jaxrank.text.prompt_tokens import Part
from jaxrank.types import Patches

FORMS = (
    'a string, a Pillow image, {"text": ...}, {"image": Pillow image, path or bytes}, '
    '{"video": path, bytes or list of Pillow images}, or a list of those'
)


class Contents:
    """The parts of one request's contents. Each image or video is read once, however often it is given.

    Files are read and decoded in this process, because they are the program's own.

    Args:
        settings: how the model needs images and video.
    """

    def __init__(self, settings: Preprocessing):
        self.settings = settings
        self._read: dict[tuple[str, object], Patches] = {}
        self._held: list[Any] = []

    def parts(self, content: Any, where: str) -> str | list[Part]:
        """Return a string as it is, and everything else as parts.

        Args:
            content: one query or document, in one of FORMS.
            where: the name of the content in error messages.

        Raises:
            RequestError: the content has none of FORMS, or a file cannot be read.
            MediaError: an image or video cannot be decoded.
        """
        if isinstance(content, str):
            return content
        if isinstance(content, Mapping) and isinstance(content.get("content"), list | tuple):
            content = content["content"]
        if isinstance(content, list | tuple):
            return [self._part(one, f"{where}[{i}]") for i, one in enumerate(content)]
        return [self._part(content, where)]

    def _part(self, content: Any, where: str) -> Part:
        if isinstance(content, str | Patches):
            return content
        if isinstance(content, Image.Image):
            return self._media("image", content, where)
        if isinstance(content, Mapping):
            for kind in ("image", "video"):
                if kind in content:
                    return self._media(kind, content[kind], where)
            if isinstance(content.get("text"), str):
                return content["text"]
        raise RequestError(f"{where} is {type(content).__name__}; it must be {FORMS}")

    def _media(self, kind: str, source: Any, where: str) -> Patches:
        key = (kind, str(source) if isinstance(source, str | PathLike) else id(source))
        if key in self._read:
            return self._read[key]
        self._held.append(source)  # keeps the object alive, so that no other one gets its id
        try:
            if isinstance(source, str | PathLike):
                if "://" in str(source):
                    raise RequestError(f"{where} is an address; the library reads files, the server fetches addresses")
                source = Path(source).read_bytes()
            if kind == "image" and isinstance(source, bytes | Image.Image):
                made = image_patches(source, self.settings)
            elif kind == "video" and (isinstance(source, bytes) or _are_images(source)):
                made = video_patches(source, self.settings)
            else:
                raise RequestError(f"{where} holds {type(source).__name__} as its {kind}; it must be {FORMS}")
        except OSError as error:
            raise RequestError(f"{where} cannot be read: {error.strerror or error}") from error
        except MediaError as error:
            raise MediaError(error.code, f"{where} is {error}") from error
        self._read[key] = made
        return made


def _are_images(source: Any) -> bool:
    return isinstance(source, Sequence) and bool(source) and all(isinstance(one, Image.Image) for one in source)
