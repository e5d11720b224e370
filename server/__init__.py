"""jaxrank over HTTP: the only part that knows HTTP and JSON. Import it as jaxrank.server."""

from jaxrank.server.app import create_app
from jaxrank.server.serve import serve

__all__ = ["create_app", "serve"]
