"""Options of every command: one pydantic class per command, without torch; every other package may import it."""
