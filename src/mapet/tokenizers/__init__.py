"""From images to visual tokens: frozen teachers, k-means and scalar quantizers, codebook, VQ-KD, dVAE."""
