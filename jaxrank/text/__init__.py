"""Texts become token ids: prompts, tokenizer, windows of long documents. Without JAX."""
