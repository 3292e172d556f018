"""Tasks with richer annotations than one class an image: several classes, masks, boxes."""
