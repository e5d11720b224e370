"""jaxrank: rerankers on JAX.

from jaxrank import Reranker
Reranker.from_pretrained("BAAI/bge-reranker-v2-m3").rank("what is panda?", ["hi", "The giant panda is a bear."])
"""

from typing import TYPE_CHECKING, Any

from jaxrank.errors import CheckpointError, JaxrankError, ModelError, RequestError, TooLongError, UnsupportedError
from jaxrank.version import __version__

if TYPE_CHECKING:
    from jaxrank.cross_encoder import CrossEncoder
    from jaxrank.reranker import Reranker
    from jaxrank.types import Ranked

__all__ = [
    "CheckpointError",
    "CrossEncoder",
    "JaxrankError",
    "ModelError",
    "Ranked",
    "RequestError",
    "Reranker",
    "TooLongError",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import what needs JAX at first use.

    The import takes a second, and `jaxrank --version` need not wait for it.
    """
    if name == "CrossEncoder":
        from jaxrank.cross_encoder import CrossEncoder

        return CrossEncoder
    if name == "Reranker":
        from jaxrank.reranker import Reranker

        return Reranker
    if name == "Ranked":
        from jaxrank.types import Ranked

        return Ranked
    raise AttributeError(f"module 'jaxrank' has no attribute {name!r}")
