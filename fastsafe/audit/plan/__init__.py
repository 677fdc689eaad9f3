"""What a run will do, laid out and hashed before anything is computed."""
