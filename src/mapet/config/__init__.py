"""Options of every command: one pydantic class a command, without torch, below everything that uses them."""
