"""Servers that run elsewhere: in a process of their own, or in the actors of a cluster."""
