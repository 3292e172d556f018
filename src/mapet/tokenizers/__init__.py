"""Visual tokens: a frozen teacher's features of each patch, and the k-means codebook that names them."""
