"""Protocols for images with more than one class: several labels, segmentation, detection."""
