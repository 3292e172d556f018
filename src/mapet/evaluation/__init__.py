"""How good are frozen features, and the fine-tuned model: k-NN, linear probe, accuracy."""
