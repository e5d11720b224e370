"""Parameters: jaxrank's own folders, and each device's part of what files hold."""
