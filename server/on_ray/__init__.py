"""The server as an application of Ray Serve."""
