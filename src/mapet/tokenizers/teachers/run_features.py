"""The backbone of an earlier pre-training run as a teacher, for a further round (HuBERT, arXiv 2106.07447, clusters its own features)."""

import shutil
from pathlib import Path

from mapet.config.shared import Size
from mapet.errors import MapetError
from mapet.run_state import pretrain_folder, try_read_state
from mapet.tokenizers.teachers.timm_model import TimmFeatures


class RunFeatures(TimmFeatures):
    """Feature maps of the backbone of a run of `mapet run`, `pretrain` or `demo`; `save` keeps a copy with the tokenizer.

    Attributes:
        metadata: beside that of `TimmFeatures` 'learned_from', the description of the tokenizer whose tokens the run predicted: its
            teacher and whether that was label-free.
    """

    def __init__(
        self, teacher: str, channels: int, teacher_size: Size | None, layer: int, output: str, saved: Path | None
    ) -> None:
        """Load the backbone of the run in the folder `teacher`, or the copy in the folder `saved`.

        Args:
            teacher: folder of the run.
            channels, teacher_size, layer, output: see `TimmFeatures`.
            saved: folder that `save` wrote; None: the backbone is that of the run.

        Raises:
            MapetError: the folder has no finished run, or see `TimmFeatures`.
        """
        run = pretrain_folder(Path(teacher))
        self.folder = saved or run / "backbone"
        if not (self.folder / "config.json").is_file():
            raise MapetError(
                f"teacher '{teacher}' is a folder without a finished run: give one of `mapet run` or `mapet pretrain` that has a backbone",
                field="teacher", value=teacher,
            )  # fmt: skip
        super().__init__(f"local-dir:{self.folder}", None, channels, teacher_size, layer, output)
        state = try_read_state(run)
        if state is not None:
            tokenizer = state.results.get("tokenizer", {})
            is_label_free = tokenizer.get("label_free", False) and not state.config.get("init_from")
            self.metadata["learned_from"] = {**tokenizer, "label_free": is_label_free}

    def save(self, folder: Path) -> None:
        """Copy the backbone, timm's config.json and model.safetensors, into a new folder."""
        shutil.copytree(self.folder, folder)
