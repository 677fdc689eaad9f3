"""Rows of conversations and what becomes of them: checked, mixed, made training tokens."""
