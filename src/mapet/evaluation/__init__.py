"""Frozen features and what they are worth: probes, k-NN, few-shot, robustness, segmentation, detection."""
