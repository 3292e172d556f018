"""Stage: the ViT learns to predict visual words."""

from pathlib import Path

from mapet.commands.command import command
from mapet.config.pretraining import PretrainConfig


@command(PretrainConfig, distributed=True)
def pretrain(config: PretrainConfig) -> Path:
    """Pre-train a timm ViT to predict visual words (MaPeT); returns the folder of the exported backbone.

    Example:
      mapet pretrain --images PHOTOS --tokenizer runs/tokenizer --tokens runs/tokens --out runs/vit
      mapet pretrain runs/vit/config.yaml --resume
    """
    from mapet.errors import Interrupted
    from mapet.reports.page import write_run_report
    from mapet.run_state import record_end
    from mapet.training.checkpoint import NonFiniteError
    from mapet.training.tasks.pretraining import PretrainingTask
    from mapet.training.trainer import Trainer

    try:
        backbone = Trainer(PretrainingTask(), config).fit()
    except (Interrupted, NonFiniteError) as error:
        record_end(config.out, error)
        write_run_report(config.out)
        raise
    write_run_report(config.out)
    return backbone
