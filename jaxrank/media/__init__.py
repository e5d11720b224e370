"""Images and video become patches. Nothing here uses JAX."""
