"""What the commands do: each file answers one word of the command line, without its arguments."""
