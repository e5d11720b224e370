"""jaxrank: rerankers on JAX.

from jaxrank import Reranker
Reranker.from_pretrained("BAAI/bge-reranker-v2-m3").rank("what is panda?", ["hi", "The giant panda is a bear."])
"""

from typing import TYPE_CHECKING, Any

from jaxrank.errors import CheckpointError, JaxrankError, ModelError, RequestError, TooLongError, UnsupportedError
from jaxrank.version import __version__

if TYPE_CHECKING:
    from jaxrank.reranker import Reranker
    from jaxrank.types import Ranked

__all__ = [
    "CheckpointError",
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
    """Reranker and Ranked on first use: importing JAX takes a second that `jaxrank --version` need not wait for."""
    if name == "Reranker":
        from jaxrank.reranker import Reranker

        return Reranker
    if name == "Ranked":
        from jaxrank.types import Ranked

        return Ranked
    raise AttributeError(f"module 'jaxrank' has no attribute {name!r}")
