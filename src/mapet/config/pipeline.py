"""Options of `demo`, `run` and `study`."""

import datetime
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic.functional_validators import BeforeValidator

from mapet.config import shared
from mapet.config.base import Config, Options
from mapet.config.evaluation import FinetuneOptions
from mapet.config.limits import LimitOptions
from mapet.config.pretraining import PretrainOptions
from mapet.config.tokenizers import FitTokenizerOptions, Teachers, TokenizeOptions
from mapet.errors import MapetError, option


class DemoConfig(shared.ResumeOptions, shared.SeedOptions):
    """Options of `demo`."""

    out: Path = Path("demo")
    """New folder for the digits, the run and the figures."""


SHORTCUTS = {
    **dict.fromkeys(("image_size", "patch_size", "teacher"), "fit_tokenizer"),
    **dict.fromkeys(("model", "objective", "epochs", "batch_size", "lr"), "pretrain"),
}
"""Option of `run` -> the section whose option of this name it is."""
NUMBER_AND_UNIT = re.compile(r"([0-9.]+)\s*(s|m|min|h|d|)")
MINUTES = {"s": 1 / 60, "m": 1, "min": 1, "": 1, "h": 60, "d": 1440}


def _as_minutes(value: object) -> object:
    """Return the minutes of a text such as '30m', '2h' or '90'; other values unchanged, which pydantic validates.

    Raises:
        ValueError: a text of another form.
    """
    if not isinstance(value, str):
        return value
    if not (match := NUMBER_AND_UNIT.fullmatch(value.strip().lower())):
        raise ValueError("must be minutes, or a number with its unit: 30m, 2h, 1d")
    return float(match[1]) * MINUTES[match[2]]


def default_out(images: str) -> Path:
    """Return runs/FOLDER-DATE for a source of images, or runs/FOLDER-DATE-2, -3, ... if that folder holds something."""
    is_path = not images.startswith(shared.HF_PREFIX) and not shared.is_url(images)
    name = re.sub(r"[^\w.-]+", "-", Path(images).resolve().name if is_path else images).strip("-.")
    first = Path("runs") / f"{name or 'images'}-{datetime.date.today().isoformat()}"
    others = (first.with_name(f"{first.name}-{index}") for index in itertools.count(2))
    return next(path for path in itertools.chain([first], others) if not (path.is_dir() and any(path.iterdir())))


SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Name of a folder, in lower case -> the split that it holds."""


def find_splits(images: str) -> dict[str, Path]:
    """Return split -> folder if a source is a folder whose subfolders are splits: train/ and val/ or test/, and nothing else; else {}."""
    folders = [path for path in Path(images).glob("*") if path.is_dir() and not path.name.startswith(".")]
    splits = {SPLIT_NAMES.get(path.name.lower(), ""): path for path in folders}
    return splits if "train" in splits and len(splits) > 1 and "" not in splits else {}


def _class_folders(folder: Path) -> set[str]:
    """Return the names of a folder's subfolders."""
    return {path.name for path in folder.glob("*") if path.is_dir() and not path.name.startswith(".")}


class RunConfig(shared.ImageOptions, shared.GroupOptions, shared.JobOptions):
    """Options of `run` and `check`: where from and where to, how long, and a section of options for each stage.

    What is not given is chosen for the images, this machine and `time`. Of a folder with train/ and val/ or test/, `images` becomes train/
    and, unless it is given and if both have the same class folders, `test_images` becomes test/, or val/ without that.
    """

    file_only: ClassVar[frozenset[str]] = frozenset({"evaluation_images"})
    out: Path = Path("runs/FOLDER-DATE")
    """New folder for everything: tokenizer, tokens, pre-training run, backbone, evaluation, figures, report.html."""
    time: Annotated[PositiveFloat, BeforeValidator(_as_minutes)] = 30
    """Time for everything, from start to verdict: minutes, or with a unit 30m, 2h, 1d. With `epochs`, these decide how long it takes."""
    test_images: shared.Source | None = None
    """Labeled images to test the features on; auto: a 20 % hold-out split of `images`, if those are in class folders."""
    evaluation_images: PositiveInt | None = None
    """Labeled images of each set that the evaluation takes at most; auto: as many as there is time for."""
    image_size: shared.Size | None = Field(default=None, exclude=True)
    """Height and width of the student's input, pixels; auto: chosen."""
    patch_size: PositiveInt | None = Field(default=None, exclude=True)
    """Side of the student's patches, pixels; auto: chosen."""
    teacher: Teachers | None = Field(default=None, exclude=True)
    """Frozen encoder, or several, whose features become tokens, as in `fit-tokenizer`; auto: chosen."""
    model: str | None = Field(default=None, exclude=True)
    """timm VisionTransformer, by name; auto: chosen."""
    objective: str | None = Field(default=None, exclude=True)
    """mapet, pim, mim, cae or an ablation, as in `pretrain`; auto: chosen."""
    epochs: PositiveFloat | None = Field(default=None, exclude=True)
    """Number of training epochs; auto: what fits into `time`."""
    batch_size: PositiveInt | None = Field(default=None, exclude=True)
    """Images per step, over all ranks; auto: chosen."""
    lr: PositiveFloat | None = Field(default=None, exclude=True)
    """Peak learning rate; auto: chosen."""
    fit_tokenizer: FitTokenizerOptions = FitTokenizerOptions()
    tokenize: TokenizeOptions = TokenizeOptions()
    pretrain: PretrainOptions = PretrainOptions()

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: object) -> object:
        """Expand options that Python gives to the class itself, and set `out` if it is not given, before validation.

        Args:
            values: option -> value; anything else is returned unchanged, for pydantic to refuse.

        Returns:
            The options with sections instead of `SHORTCUTS`, with `out`, and with `images` and `test_images` of a folder of splits.
        """
        if not isinstance(values, Mapping):
            return values
        expanded = cls.expand(values)
        if "out" not in expanded and isinstance(images := expanded.get("images"), (str, os.PathLike)):
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise ValueError(f"{option('out')} is required where several processes run: they must agree on it")
            expanded["out"] = default_out(os.fspath(images))
        if isinstance(images := expanded.get("images"), (str, os.PathLike)) and (
            splits := find_splits(os.fspath(images))
        ):
            test = splits.get("test", splits.get("val", splits["train"]))
            classes = _class_folders(splits["train"])
            if expanded.get("test_images") is None and len(classes) > 1 and classes == _class_folders(test):
                expanded["test_images"] = str(test)
            expanded["images"] = str(splits["train"])
        return expanded

    @classmethod
    def expand(cls, options: Options) -> dict[str, Any]:
        """Move the values of `SHORTCUTS` into their sections.

        Raises:
            MapetError: an option is given both ways.
        """
        expanded = {name: value for name, value in options.items() if name not in SHORTCUTS}
        for name in SHORTCUTS.keys() & options.keys():
            value, section = options[name], expanded.get(SHORTCUTS[name], {})
            if value in (None, "auto", "none", ["auto"], ["none"]):
                continue
            section_options = section.model_dump(exclude_unset=True) if isinstance(section, Config) else section
            if name in section_options:
                both = f"{option(name)} is given twice, also as {option(f'{SHORTCUTS[name]}.{name}')}: omit one"
                raise MapetError(both, field=name, value=value)
            expanded[SHORTCUTS[name]] = {**section_options, name: value}
        return expanded

    @property
    def user_options(self) -> dict[str, dict[str, Any]]:
        """Return section -> option -> value, of the options that the user has given and the plan leaves as they are."""
        sections = ("fit_tokenizer", "tokenize", "pretrain")
        return {name: getattr(self, name).model_dump(exclude_unset=True) for name in sections}


class StudyConfig(LimitOptions):
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
