"""Options of `demo`, `run` and `study`."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from mapet.config import shared
from mapet.config.base import Config
from mapet.config.evaluation import FinetuneOptions
from mapet.config.pretraining import PretrainOptions
from mapet.config.tokenizers import FitTokenizerOptions, TokenizeOptions


class DemoConfig(shared.ResumeOptions, shared.SeedOptions):
    """Options of `demo`."""

    out: Path = Path("demo")
    """New folder for the digits, the run and the figures."""


class RunConfig(shared.ImageOptions, shared.JobOptions):
    """Options of `run`: where from and where to, and a section of options for each stage."""

    out: Path
    """New folder for everything: tokenizer, tokens, pre-training run, backbone, evaluation, figures, report.html."""
    test_images: shared.Source | None = None
    """Labeled images to test the features on; auto: a 20 % hold-out split of `images`, if those are in class folders."""
    fit_tokenizer: FitTokenizerOptions = FitTokenizerOptions()
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()


class StudyConfig(Config):
    """Options of `study`, usually a YAML file."""

    resume: ClassVar[bool] = True
    """Always: what is done in `out` is not done again."""
    images: shared.Source
    """Labeled images (class folders, .tar shards or hf:NAME): for pre-training, without their labels, and for training probes."""
    test_images: shared.Source
    """Labeled images to test on."""
    out: Path
    """Folder of the study; what is done in it already is kept."""
    ood_images: dict[str, shared.Source] = Field(default_factory=dict)
    """Further (out-of-distribution) test sets of the same classes, NAME=FOLDER."""
    tokenizers: dict[str, FitTokenizerOptions] = Field(min_length=1)
    """name -> options of `fit-tokenizer`: 'pixels={}' for all defaults, or 'pixels={image_size: 32, patch_size: 4}'; quoted for the
    shell."""
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(min_length=1)
    """Varied options: an option of `pretrain`, or `tokenizer`, with a list of values; or any name with NAME -> options."""
    seeds: list[shared.Seed] = Field(default=[0, 1, 2], min_length=1)
    """Seeds that each trial is run with: of weights, order of images, views and permutations."""
    compare_by: str | None = None
    """Varied name whose values are compared in pairs, all else being equal; auto: the only one, else objective."""
    equal_compute: bool = True
    """Run cheaper values also for more epochs, until they match the FLOPs of the most expensive one to half a step."""
    labels_per_class: list[PositiveInt | Literal["all"]] = Field(default=[10])
    """Labeled images of each class to fine-tune on (a number, or all), one fine-tuning for each."""
    devices: list[str] = Field(default=["auto"])
    """Devices, with one process each: auto, cuda:0, cuda:1, ...; cpu cpu: two that share the cores (faster, for small models)."""
    report_only: bool = False
    """Write the report of what is done, and run nothing."""
