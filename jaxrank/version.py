"""The version. It has a file of its own so that it can be read without an import of JAX."""

__version__ = "0.1.0"
