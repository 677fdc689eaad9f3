"""Safety rows, their style, and how they are mixed into a user's data."""
