"""Rates, intervals and tests."""
