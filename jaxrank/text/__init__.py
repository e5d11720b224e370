"""Texts become token ids: prompts, tokenizer, windows of long documents. Nothing here uses JAX."""
