"""ViTs and objectives: the attention mask of each objective, packing, losses, loading, conversion, export."""
