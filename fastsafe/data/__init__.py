"""Rows of conversations and what becomes of them: read, mixed, turned into training tokens."""
