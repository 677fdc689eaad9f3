"""Backends that train and generate for a run: the engine, or transformers and PEFT."""
