"""Evaluation of frozen features: probes, k-NN, few-shot, robustness, segmentation, detection; and of visual tokens."""
