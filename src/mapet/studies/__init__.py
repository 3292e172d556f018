"""Controlled comparisons: a grid of trials and the statistics over them."""
