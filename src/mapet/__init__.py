"""mapet: pre-train Vision Transformers on your own images by masked and permuted visual-token prediction.

Each command of the command line is a function here, which takes its config's fields as keywords:

    import mapet
    mapet.run(images="photos", out="runs/photos")
    model, transform = mapet.load("runs/photos")     # a plain timm VisionTransformer, and what turns images into its input
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mapet.errors import Interrupted, MapetError

if TYPE_CHECKING:
    from mapet.commands import *  # noqa: F403
    from mapet.models.backbone import load
    from mapet.models.pooling import pooled_features

__version__ = "0.1.0"
__all__ = [
    "Interrupted", "MapetError", "__version__", "check", "debug_step", "demo", "embed", "evaluate", "export", "finetune", "fit_tokenizer",  # noqa: F405
    "inspect_tokenizer", "load", "pooled_features", "predict", "prepare", "pretrain", "report", "run", "search", "study",  # noqa: F405
    "tokenize", "train_tokenizer",  # noqa: F405
]  # fmt: skip

MODEL_FUNCTIONS = {"load": "backbone", "pooled_features": "pooling"}
"""Public functions that are no commands -> their module in `models`."""


def __getattr__(name: str) -> Any:
    """Import commands, `load` and `pooled_features` on first use, so that `import mapet` and `--help` are quick."""
    if name in MODEL_FUNCTIONS:
        return getattr(import_module(f"mapet.models.{MODEL_FUNCTIONS[name]}"), name)
    if name in __all__ and not name.startswith("__"):
        from mapet.commands import COMMANDS

        return COMMANDS[name.replace("_", "-")]
    raise AttributeError(f"module 'mapet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
