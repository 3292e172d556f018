"""Pictures of what a tokenizer and a backbone have learned."""
