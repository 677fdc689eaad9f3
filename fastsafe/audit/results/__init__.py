"""From stored rows to `results.json`."""
