"""Parameters: jaxrank's own folders, and each device's part of the parameters in files."""
