"""The objective as a table, the packing of its segments, the timm ViT that learns it, and that ViT on disk."""
