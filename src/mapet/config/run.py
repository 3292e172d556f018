"""Options of `run`."""

from pathlib import Path

from pydantic import NonNegativeInt

from mapet.config.fit_tokenizer import FitTokenizerOptions
from mapet.config.pretrain import PretrainOptions
from mapet.config.report import FigureOptions
from mapet.config.shared import BadImages
from mapet.config.tokenize import TokenizeOptions
from mapet.config.types import Source


class RunConfig(BadImages):
    """Options of `run`: where from and where to, and a section of options for each stage."""

    images: Source
    """Folder of images, text file of paths, .tar shards (also by URL), or hf:NAME[:SPLIT] of Hugging Face's `datasets`."""
    out: Path
    """New folder for everything: tokenizer, tokens, pre-training run, backbone, probe, figures, report.html."""
    test_images: Source | None = None
    """Labelled images to test the features on; automatic: a fifth of `images`, if those are in class folders."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: NonNegativeInt = 0
    """Seed of everything."""
    resume: bool = False
    """Go on with a run that was interrupted: finished stages are kept."""
    fit_tokenizer: FitTokenizerOptions = FitTokenizerOptions()
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()
    report: FigureOptions = FigureOptions()
