"""The run's SQLite store."""
