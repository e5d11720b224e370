"""The errors of jaxrank, as one small tree.

    JaxrankError
    ├── RequestError       a query, document or argument cannot be scored; the caller can correct it
    │   ├── TooLongError   a pair does not fit and may not be truncated
    │   └── MediaError     an image or video cannot be fetched, read or accepted
    └── ModelError         a model cannot be loaded, converted or saved
        ├── CheckpointError    files are missing, damaged, or do not match the model
        └── UnsupportedError   jaxrank does not implement the architecture or configuration

A message says what was received, what is allowed, and what to do.
"""


class JaxrankError(Exception):
    """The base class of every error that jaxrank raises on purpose."""


class RequestError(JaxrankError, ValueError):
    """A query, document or argument cannot be scored."""


class TooLongError(RequestError):
    """A pair is longer than the limit, and truncation was refused.

    Attributes:
        tokens: the number of tokens that the pair has at least.
        limit: the number of tokens that it may have.
    """

    def __init__(self, message: str, tokens: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class MediaError(RequestError):
    """An image or video cannot be fetched, read or accepted.

    The text is one of a fixed set. It contains nothing from the file, the address or the decoder. It continues a
    sentence such as "the file is" or "the address is", so that a caller can put the place of the media before it.

    Attributes:
        code: a stable name of the reason.
        index: the place of the item where several were given as a list.
    """

    def __init__(self, code: str, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.index = index


class ModelError(JaxrankError):
    """A model cannot be loaded, converted or saved."""


class CheckpointError(ModelError):
    """Files of a model are missing, damaged, or do not match the model."""


class UnsupportedError(ModelError):
    """jaxrank does not implement the architecture or configuration."""
