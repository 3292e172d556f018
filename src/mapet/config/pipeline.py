"""Options of `demo`, `run` and `study`."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mapet.config import shared
from mapet.config.base import Config
from mapet.config.evaluation import FinetuneOptions
from mapet.config.pretraining import PretrainOptions
from mapet.config.tokenizers import FitTokenizerOptions, TokenizeOptions


class DemoConfig(shared.ResumeOptions, shared.SeedOptions):
    """Options of `demo`."""

    out: Path = Path("demo")
    """New folder for the digits, the run and the pictures."""


class RunConfig(
    shared.ImageOptions, shared.UnreadableImageOptions, shared.DeviceOptions, shared.ResumeOptions, shared.SeedOptions
):
    """Options of `run`: where from and where to, and a section of options for each stage."""

    out: Path
    """New folder for everything: tokenizer, tokens, pre-training run, backbone, probe, figures, report.html."""
    test_images: shared.Source | None = None
    """Labeled images to test the features on; automatic: a fifth of `images`, if those are in class folders."""
    fit_tokenizer: FitTokenizerOptions = FitTokenizerOptions()
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()


class StudyConfig(Config):
    """Options of `study`, usually a YAML file."""

    resume: ClassVar[bool] = True
    """Always: what is done in `out` is not done again."""
    images: shared.Source
    """Labeled images, in class folders or as .tar shards or hf:NAME: to pre-train on (without labels) and to train probes on."""
    test_images: shared.Source
    """Labeled images to test on."""
    out: Path
    """Folder of the study; what is done in it already is not done again."""
    ood_images: dict[str, shared.Source] = Field(default_factory=dict)
    """Further test sets of the same classes (out of distribution): name=folder."""
    tokenizers: dict[str, FitTokenizerOptions] = Field(min_length=1)
    """name -> options of `fit-tokenizer`: 'pixels={}' for all defaults, 'pixels={image_size: 32, patch_size: 4}'; quotes keep the
    shell off."""
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(min_length=1)
    """What is varied: an option of `pretrain`, or `tokenizer`, with a list of values; or any name, with name -> options."""
    seeds: list[NonNegativeInt] = Field(default=[0, 1, 2], min_length=1)
    """Each trial is run with each: weights, order, views and permutations are those of the seed."""
    compare_by: str | None = None
    """The varied name whose values are compared in pairs, all else being equal; automatic: the only one, else objective."""
    equal_compute: bool = True
    """Run cheaper values also for more epochs, until they cost as many operations as the dearest."""
    labels_per_class: list[PositiveInt | Literal["all"]] = Field(default=[10])
    """Fine-tune on so many labels of each class, or all."""
    devices: list[str] = Field(default=["auto"])
    """One process for each: auto, cuda:0, cuda:1, ...; cpu cpu: two that share the cores (faster, for small models)."""
    report_only: bool = False
    """Run nothing: write the report of what is done."""
