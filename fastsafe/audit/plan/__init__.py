"""Plan a run: list and hash all its work before anything is computed."""
