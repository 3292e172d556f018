"""Figures by matplotlib, without pyplot: tensors in, a `Figure` out."""
