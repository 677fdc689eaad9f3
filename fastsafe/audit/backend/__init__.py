"""What answers and trains for a run: the engine, or transformers and PEFT."""
