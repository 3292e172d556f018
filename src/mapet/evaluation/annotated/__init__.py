"""Images with more than one class each: masks beside them, or annotations in COCO's format."""
