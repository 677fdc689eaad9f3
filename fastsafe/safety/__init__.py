"""What is asked and how answers become numbers: tasks, formats, judges, mitigations, statistics.

Nothing here imports the engine or the trainer: every part runs on a CPU with plain strings.
"""
