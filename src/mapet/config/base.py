"""Stage configs: one typed class, filled from a YAML recipe, the command line or Python keywords.

All three become one mapping that pydantic validates, so a value means the same wherever it was written.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator

from mapet.errors import MapetError, did_you_mean


class Config(BaseModel):
    """Base of every stage's config. A field's docstring is its `--help` text and gives units."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    positional: ClassVar[str | None] = None
    """The option that words without one are given to on the command line."""
    out_is_file: ClassVar[bool] = False
    """Whether `out`, if there is one, names a file; else it is a folder, which gets a run.json."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_several(cls, given: Any) -> Any:
        """Where several may be given, as on the command line, one needs no list around it."""
        if not isinstance(given, Mapping):
            return given
        several = {name for name, field in cls.model_fields.items() if _takes_any_number(field.annotation)}
        single = (str, int, float, os.PathLike)
        return {key: [value] if key in several and isinstance(value, single) else value for key, value in given.items()}


def _takes_any_number(annotation: Any) -> bool:
    """Whether it is a list, or a tuple of any length."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return Ellipsis in arguments
    return get_origin(annotation) is list or any(map(_takes_any_number, arguments))


C = TypeVar("C", bound=Config)


def _as_pair(value: Any) -> Any:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_as_pair)]
"""Height and width, pixels; one number means a square."""
Ratio = Annotated[tuple[float, float], BeforeValidator(_as_pair)]
"""A range of shares; one number means just that."""


HUGGING_FACE = "hf:"
"""How names of Hugging Face's data sets begin."""


def is_url(source: str) -> bool:
    """Whether a source of images is a URL, perhaps of several parts, rather than a path."""
    return "://" in source


def _as_source(value: Any) -> Any:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else value
    return text if not isinstance(text, str) or text.startswith(HUGGING_FACE) or is_url(text) else str(Path(text))


Source = Annotated[str, BeforeValidator(_as_source)]
"""Where images are: a path, a URL (of whose slashes a `Path` would lose one), or hf:NAME."""


def build(
    config_type: type[C], options: Mapping[str, Any], recipe: Path | None = None, typed: Mapping[str, Any] | None = None
) -> C:
    """Validate options into a config.

    Args:
        options: field name -> value; nested configs are nested mappings.
        recipe: the file that `options` came from, for error messages.
        typed: options from the command line, where errors name options as it spells them; they win over `options`.

    Raises:
        MapetError: one line for each unknown, missing or wrong option, saying where it was written.
    """
    try:
        return config_type.model_validate(_merge(options, typed or {}))
    except ValidationError as error:
        lines = [_explain(config_type, item, recipe, typed) for item in error.errors()]
        raise MapetError("; ".join(dict.fromkeys(lines))) from None


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


PLAIN = {
    "^Input should be": "must be",
    "a valid integer(, .*)?$": "a whole number",
    "a valid number(, .*)?$": "a number",
    "a valid boolean(, .*)?$": "true or false",
    "a valid (list|dictionary|tuple|string)$": r"a \1",
}
"""pydantic's words -> a person's."""


def _explain(config_type: type[Config], item: Any, recipe: Path | None, typed: Mapping[str, Any] | None) -> str:
    known = dict(fields(config_type))
    key = ".".join(str(part) for part in item["loc"])
    name = next((field for field in known if key == field or key.startswith(field + ".")), key)
    where = f" (in {recipe})" if recipe and item["loc"] and item["loc"][0] not in (typed or {}) else ""
    on_command_line = typed is not None and (item["type"] == "missing" or not where)
    shown = f"--{name.replace('_', '-')}" if on_command_line else f"option '{name}'"
    if item["type"] == "extra_forbidden":
        inner = _options_of(config_type, item["loc"])
        near = did_you_mean(str(item["loc"][-1]), inner) if inner else did_you_mean(key, known)
        return f"unknown option '{key}'{where}{near}"
    if item["type"] == "missing":
        return f"{shown} is required: {(known[name].description or '').rstrip('.') if name in known else ''}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for pydantic, plain in PLAIN.items():
        message = re.sub(pydantic, plain, message)
    return f"{shown}: {message}, got {item['input']!r}{where}" if name in known else f"{message}{where}"


def _options_of(config_type: type[Config], place: tuple[Any, ...]) -> list[str]:
    """Those of the config in a mapping name -> config, for (option, name, key) in it; else none."""
    field = config_type.model_fields.get(str(place[0])) if len(place) == 3 else None
    inner = get_args(field.annotation)[-1:] if field is not None and get_origin(field.annotation) is dict else ()
    return list(inner[0].model_fields) if inner and isinstance(inner[0], type) and issubclass(inner[0], Config) else []


def fields(config_type: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, pydantic field) of every option, nested configs opened up."""
    for name, field in config_type.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def as_options_of_section(message: str, section: str, inner: Collection[str], outer: Collection[str] = ()) -> str:
    """A stage's message with its options as a larger recipe has them, where --lr is --pretrain.lr; commands, between
    backticks, stay.

    Args:
        inner, outer: names of the stage's options, and of the larger recipe's own, which keep theirs.
    """

    def renamed(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return f"--{section.replace('_', '-')}.{found[1]}" if name in inner and name not in outer else found[0]

    parts = message.split("`")
    parts[::2] = [re.sub(r"--([a-z][a-z-]*)(?!\.?\w)", renamed, part) for part in parts[::2]]
    return "`".join(parts)


def meaning_of_none(field: Any) -> str:
    """What an option that may be None does then: its help says so where it is chosen automatically."""
    return "automatic" if "automatic" in (field.description or "") else "none"


def choices(annotation: Any) -> list[str]:
    """The values of an option that takes some fixed ones only; else none."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(argument) for argument in arguments]
    return [value for argument in arguments for value in choices(argument)]


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe: a mapping of option names to values."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MapetError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of bytes that are no text, numbers that are none
        raise MapetError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    except RecursionError:
        raise MapetError(f"{path} is not a recipe: it is nested too deeply") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise MapetError(f"{path} must be a mapping of options to values, not a {type(recipe).__name__}")
    return {str(key).replace("-", "_"): value for key, value in recipe.items()}


def write_recipe(config: "Config", path: Path) -> None:
    """Write all options as YAML, atomically."""
    from mapet.files import atomic

    with atomic(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe that repeats it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config, ignore: frozenset[str] = frozenset()) -> list[str]:
    """'key: old -> new' for every option that differs, those of a section as 'section.key'; None is what isn't given."""
    a, b = (dict(_flat(config.model_dump(mode="json", exclude=set(ignore)))) for config in (old, new))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in a | b if a.get(key) != b.get(key)]


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
