"""From a folder, archive or data set name to batches: readers, image lists, views, augmentation, token store, loader."""
