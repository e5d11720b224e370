"""Images and video become patches. Without JAX."""
