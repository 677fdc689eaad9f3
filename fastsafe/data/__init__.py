"""Rows of conversations and what becomes of them: checked, mixed, turned into training tokens."""
