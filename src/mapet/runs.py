"""Folders of runs as others find them: what they are, by the recipes in them, and how they are gone on with."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from mapet.config.base import read_recipe
from mapet.errors import MapetError


def recipe_in(folder: Path, stages: Sequence[str]) -> tuple[str, Path] | None:
    """The command that wrote a recipe of `folder`, if it is one of `stages`, and that file."""
    for path in (
        folder / "recipe.yaml",
        folder / "pretrain" / "config.yaml",
        folder / "config.yaml",
        folder / "study.yaml",
    ):
        if stage := stage_of(path, stages):
            return stage, path
    return None


def stage_of(recipe: Path, stages: Iterable[str]) -> str | None:
    """The command that wrote a recipe, as its first line says, if it is one of `stages`."""
    heading = recipe.read_text(errors="replace").split(maxsplit=3)[:3] if recipe.is_file() else []
    return next((stage for stage in stages if heading == ["#", "mapet", stage]), None)


def outer_recipe(folder: Path) -> Path | None:
    """The recipe of the `mapet run` that a folder of `pretrain` belongs to, if any: the one to go on with."""
    path = folder.parent / "recipe.yaml"
    return path if folder.name == "pretrain" and path.is_file() else None


def pretrain_folder(folder: Path) -> Path:
    """The folder of `pretrain` in one of `run`, or the folder itself."""
    inner = folder / "pretrain"
    return inner if (inner / "config.yaml").is_file() or (folder / "recipe.yaml").is_file() else folder


def named_by_run(folder: Path, recipe: Mapping[str, Any], option: str) -> str | None:
    """What a run of `pretrain` names in an option, as it is found from here.

    Its tokenizer and tokens are those in the folder of its `run`, if it belongs to one: they move with it, and another run may lie
    where it was. Other paths are relative to where the run was started, which the folder tells while it has not moved.
    """
    named = recipe.get(option)
    if named is None:
        return None
    own, out = folder.parent / option, Path(str(recipe.get("out", "")))
    if option in ("tokenizer", "tokens") and outer_recipe(folder) and own.exists():
        return str(own)
    here = folder.resolve()
    if out.parts and not out.is_absolute() and here.parts[-len(out.parts) :] == out.parts:
        from_start = here.parents[len(out.parts) - 1] / str(named)
        if not Path(str(named)).exists() and from_start.exists():
            return str(from_start)
    return str(named)


def is_tuned(folder: Path) -> bool:
    """Whether it is a folder of `finetune`, which starts from a backbone."""
    return (folder / "config.yaml").is_file() and "backbone" in read_recipe(folder / "config.yaml")


def refuse_no_run(folder: Path) -> None:
    """Raises MapetError: it is no folder of `run` or `pretrain`, finished or not."""
    if not folder.exists():
        raise MapetError(f"{folder} does not exist: give the folder of a run")
    if is_tuned(folder):
        raise MapetError(
            f"{folder} is a fine-tuned model, and reports and pictures are of pre-training: its curve is {folder / 'curve.png'}, its "
            "accuracy in result.json"
        )
    if not (pretrain_folder(folder) / "config.yaml").is_file():
        raise MapetError(f"{folder} is not a pre-training run: it has no config.yaml of one")


def nothing_to_resume(folder: Path) -> str:
    """Why a `--resume` starts from nothing: a job that may be sent anew at any moment has one command."""
    return f"nothing to resume in {folder}: a new run begins there"


def refuse_other_folder(recipe: Path, out: Path) -> None:
    """A run's own recipe goes on with that run, or somebody stands in another folder than when it was started.

    Raises:
        MapetError: `out` is not where the recipe lies, in a run that has begun.
    """
    folder = recipe.parent
    begun = any((folder / name).exists() for name in ("train.log", "tokenizer"))
    if recipe.name in ("recipe.yaml", "config.yaml") and begun and folder.resolve() != out.resolve():
        raise MapetError(
            f"{recipe} is the recipe of the run in its own folder, but --out is {out}, seen from {Path.cwd()}: go to the folder that "
            f"the run was started in, or, if it was moved, give --out {quote(str(folder))}"
        )
