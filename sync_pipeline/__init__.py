"""Keeps two PostgreSQL databases equal in both directions."""

__version__ = "0.1.0"
