"""What several tests share; importable through pytest's ``pythonpath``."""
