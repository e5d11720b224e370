"""What a request may say, and what the server tells of itself."""
