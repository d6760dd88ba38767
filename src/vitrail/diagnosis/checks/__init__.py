"""The checks, one function each, and their table."""
