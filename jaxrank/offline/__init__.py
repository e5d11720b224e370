"""Reranks files: corpora larger than memory, runs that can be interrupted, and measures of the results."""
