"""Errors that a user can act on, and files that are never left half written."""
