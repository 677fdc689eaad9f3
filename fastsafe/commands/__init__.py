"""The work of the commands: one file per command, without the parsing of arguments."""
