"""The tokenizers of a study: each fitted once, its tokens stored once, for all cells that name it."""

import logging
from pathlib import Path
from typing import Any

from mapet.commands.fit_tokenizer import fit_tokenizer
from mapet.commands.tokenize import tokenize
from mapet.config.base import Config, build, differences
from mapet.config.fit_tokenizer import FitTokenizerConfig, FitTokenizerOptions
from mapet.config.study import StudyConfig
from mapet.config.tokenize import TokenizeOptions
from mapet.errors import Interrupted, MapetError, option
from mapet.files import check_format, read_json, write_json

log = logging.getLogger("mapet")
FORMAT = 1
OPTIONS = "options.json"
FREE = frozenset({"workers", "batch_size", "memory_gb", "scratch_dir"})
"""Options that change no word."""


def make_tokenizers(config: StudyConfig, names: set[str]) -> dict[str, str]:
    """Fit and store the tokens of each; name -> reason for those that could not be made."""
    from mapet.config.shared import is_own_code

    broken = {}
    for name in sorted(names):
        fitting, folder = fitting_config(config, name), tokenizer_folder(config, name)
        options = _options(config, name)
        write_json(folder / OPTIONS, {"format": FORMAT, **options})
        try:
            if not fitting.out.exists():
                log.info("--- tokenizer %s", name)
                fit_tokenizer(fitting)
            tokenize(
                images=fitting.images, device=fitting.device, tokenizer=fitting.out, out=folder / "tokens", resume=True,
                trust_teacher=fitting.teacher if is_own_code(fitting.teacher) else None, **options["tokenize"],
            )  # fmt: skip
        except Interrupted as error:
            raise Interrupted(error.what, "the same command") from None
        except MapetError as error:
            broken[name] = str(error)
            log.warning("tokenizer %s: %s", name, error)
    return broken


def fitting_config(config: StudyConfig, name: str) -> FitTokenizerConfig:
    """Raises MapetError: options that contradict each other."""
    shared = {"images": config.images, "device": config.devices[0], "out": tokenizer_folder(config, name) / "tokenizer"}
    try:
        return build(FitTokenizerConfig, _options(config, name)["fit_tokenizer"] | shared | {"resume": True})
    except MapetError as error:
        raise MapetError(f"tokenizer '{name}': {error}") from None


def refuse_other_tokenizer(config: StudyConfig, name: str) -> None:
    """A tokenizer that was begun goes on as it was, or not at all.

    Raises:
        MapetError: its options, or those of its tokens, are others now.
    """
    folder, now = tokenizer_folder(config, name), _options(config, name)
    if not (folder / OPTIONS).exists():
        return
    old = read_json(folder / OPTIONS, "tokenizer's options")
    check_format(old.get("format", 1), FORMAT, "tokenizer's options", folder)
    begun: dict[str, tuple[type[Config], tuple[str, ...]]] = {
        "fit_tokenizer": (FitTokenizerOptions, ("tokenizer", "tokenizer.kmeans.safetensors")),
        "tokenize": (TokenizeOptions, ("tokens",)),
    }
    for stage, (options, made) in begun.items():
        if any((folder / part).exists() for part in made):
            changed = differences(build(options, old[stage]), build(options, now[stage]), FREE)
            if changed:
                raise MapetError(
                    f"{folder} was made with other options ({'; '.join(changed)}): use the same, another name for it, or a new {option('out')}"
                )


def tokenizer_folder(config: StudyConfig, name: str) -> Path:
    """It holds `tokenizer` and `tokens`."""
    return config.out / "tokenizers" / name


def _options(config: StudyConfig, name: str) -> dict[str, dict[str, Any]]:
    """As they were given, by stage."""
    sections = {"fit_tokenizer": config.tokenizers[name], "tokenize": config.tokenize}
    return {stage: section.model_dump(mode="json", exclude_unset=True) for stage, section in sections.items()}
