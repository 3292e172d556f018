"""The tokenizers of a study: each fitted once, its tokens stored once, for all trials that name it."""

import logging
from pathlib import Path

from mapet.config.base import build, differences
from mapet.config.pipeline import StudyConfig
from mapet.config.shared import is_own_code
from mapet.config.tokenizers import FitTokenizerConfig, TokenizeConfig
from mapet.errors import Interrupted, MapetError, option
from mapet.files import is_free
from mapet.run_state import read_or_none, run_state
from mapet.tokenizers.stages import fit_tokenizer, tokenize

log = logging.getLogger("mapet")
FREE = frozenset({"memory_gb", "images", "out", "tokenizer", "device", "resume", "trust_teacher"})
"""Options that change no token: how fast, and where things are, whose hashes are compared elsewhere."""


def make_tokenizers(config: StudyConfig, names: set[str]) -> dict[str, str]:
    """Fit each and store its tokens; return name -> reason for those that could not be made."""
    broken = {}
    for name in sorted(names):
        fitting, tokenizing = tokenizer_configs(config, name)
        try:
            if is_free(fitting.out):
                log.info("--- tokenizer %s", name)
                with run_state(fitting.out, "fit-tokenizer", fitting):
                    fit_tokenizer(fitting)
            with run_state(tokenizing.out, "tokenize", tokenizing):
                tokenize(tokenizing)
        except Interrupted as error:
            raise Interrupted(error.what, "the same command") from None
        except MapetError as error:
            broken[name] = str(error)
            log.warning("tokenizer %s: %s", name, error)
    return broken


def tokenizer_configs(config: StudyConfig, name: str) -> tuple[FitTokenizerConfig, TokenizeConfig]:
    """Return what `fit-tokenizer` and `tokenize` are called with.

    Raises:
        MapetError: options that contradict each other, or other options than those it was made with.
    """
    folder, options = tokenizer_folder(config, name), config.tokenizers[name].model_dump(exclude_unset=True)
    shared = {"images": config.images, "device": config.devices[0], "resume": True}
    try:
        fitting = build(FitTokenizerConfig, options | shared | {"out": folder / "tokenizer"})
    except MapetError as error:
        raise MapetError(f"tokenizer '{name}': {error}") from None
    teacher = fitting.teacher if is_own_code(fitting.teacher) else None
    given = {"out": folder / "tokens", "tokenizer": fitting.out, "trust_teacher": teacher}
    tokenizing = build(TokenizeConfig, config.tokenize.model_dump(exclude_unset=True) | shared | given)
    for now in (fitting, tokenizing):
        state = read_or_none(now.out)
        if state and (changed := differences(build(type(now), state.config), now, FREE)):
            raise MapetError(
                f"{folder} was made with other options ({'; '.join(changed)}): use the same, another name for it, or a new {option('out')}"
            )
    return fitting, tokenizing


def tokenizer_folder(config: StudyConfig, name: str) -> Path:
    """Return the folder that holds `tokenizer` and `tokens`."""
    return config.out / "tokenizers" / name
