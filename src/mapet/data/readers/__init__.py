"""Read image files: a module for each family of formats, `open` chooses among them, `image` is what they make."""
