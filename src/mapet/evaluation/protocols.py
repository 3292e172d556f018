"""The protocols of `mapet evaluate`, each registered where it is defined: a function from a backbone and data to metrics."""

from mapet.evaluation import classification, dense, label_free, robustness
from mapet.evaluation.eval_context import PROTOCOLS, Protocol

__all__ = ["PROTOCOLS", "Protocol", "classification", "dense", "label_free", "robustness"]
