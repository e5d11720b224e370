"""What can go wrong, as one small tree.

    JaxrankError
    ├── RequestError       a query, document or argument that cannot be scored; the caller can mend it
    │   ├── TooLongError   a pair that does not fit and may not be truncated
    │   └── MediaError     an image or video that cannot be had, read or taken
    └── ModelError         a model that cannot be loaded, converted or saved
        ├── CheckpointError    files missing, damaged, or not matching the model
        └── UnsupportedError   an architecture or configuration that jaxrank does not implement

Messages say what came, what is allowed, and what to do.
"""


class JaxrankError(Exception):
    """Base of every error that jaxrank raises on purpose."""


class RequestError(JaxrankError, ValueError):
    """A query, document or argument that cannot be scored."""


class TooLongError(RequestError):
    """A pair longer than the limit, where truncation was refused. tokens: what it has, at least. limit: what it may."""

    def __init__(self, message: str, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class MediaError(RequestError):
    """An image or video that cannot be had, read or taken.

    code: a stable name of the reason. The text is one of a fixed set, without anything of the file, the address or the
    decoder; it goes on after "the file is", "the address is" and the like, so that a caller can put the place of the
    media before it. index: which of several media, where they were given as a list.
    """

    def __init__(self, code: str, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.index = index


class ModelError(JaxrankError):
    """A model that cannot be loaded, converted or saved."""


class CheckpointError(ModelError):
    """Files of a model that are missing, damaged, or do not match the model."""


class UnsupportedError(ModelError):
    """An architecture or configuration that jaxrank does not implement."""
