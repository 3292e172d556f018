"""Options of every command: one pydantic class a command, by family, without torch, below everything that uses them."""
