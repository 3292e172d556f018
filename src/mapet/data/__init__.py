"""Images in: lists of files, decoding, views, batches, and the store of their token ids."""
