"""Reranking files: corpora larger than memory, runs that can be interrupted, and measures of what came out."""
