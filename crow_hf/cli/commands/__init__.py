"""One module per command: its arguments, what it calls, and what it prints."""
