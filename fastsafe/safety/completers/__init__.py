"""Asking a model in plain messages: the protocol, and OpenAI-compatible endpoints."""
