"""The links between actors and a server."""
