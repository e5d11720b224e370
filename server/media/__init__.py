"""The images and videos that a request names."""
