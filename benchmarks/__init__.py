"""Scripts, and the modules that they share."""
