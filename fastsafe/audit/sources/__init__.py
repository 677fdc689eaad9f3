"""Where behaviours and task rows come from."""
