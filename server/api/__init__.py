"""The contents of requests, and the facts that the server reports of itself."""
