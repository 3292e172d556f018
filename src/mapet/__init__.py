"""mapet: pre-train Vision Transformers on your own images by masked and permuted visual-token prediction.

One function a stage, the same as the command line's: `check`, `prepare`, `train_tokenizer`, `fit_tokenizer`, `tokenize`,
`pretrain`, `watch`, `replay`, `probe`, `evaluate`, `finetune`, `inspect`, `report`, `embed`, `export`, `run`, `study`, `demo`.
Each takes its config's fields as keywords:

    import mapet
    mapet.run(images="photos", out="runs/photos")
    vit = mapet.load_backbone("runs/photos/backbone")     # a plain timm VisionTransformer
"""

from typing import Any

from mapet.errors import Interrupted, MapetError

__version__ = "0.1.0"
__all__ = ["Interrupted", "MapetError", "__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    """Stages and `load_backbone` are imported on first use, so that `import mapet` and `--help` are quick."""
    if name == "load_backbone":
        from mapet.models.backbone import load_backbone

        return load_backbone
    from mapet.commands import STAGES

    stages = {stage.replace("-", "_"): function for stage, function in STAGES.items()}
    if name in stages:
        return stages[name]
    raise AttributeError(f"module 'mapet' has no attribute {name!r}")
