"""jaxrank over HTTP. The only part that knows HTTP and JSON; import it as jaxrank.server."""

from jaxrank.server.app import create_app
from jaxrank.server.serve import serve

__all__ = ["create_app", "serve"]
