"""Options of a command: one typed class, filled from a YAML recipe, the command line or Python keywords.

All three become one mapping that pydantic validates, so a value means the same wherever it was written.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mapet.errors import MapetError, did_you_mean, option, spell_as_flags, spell_in_section
from mapet.files import write_text


class Config(BaseModel):
    """Base of every command's config. A field's docstring is its `--help` text and gives units."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    positional: ClassVar[str | None] = None
    """The option that words without one are given to on the command line."""
    out_is_file: ClassVar[bool] = False
    """Whether `out`, if there is one, names a file; else it is a folder, which gets a run.json."""
    file_only: ClassVar[frozenset[str]] = frozenset()
    """Options that have no flag: Python and config files set them."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_of_several(cls, value: Any, info: ValidationInfo) -> Any:
        """Where several may be given, as on the command line, one needs no list around it."""
        several = is_multi_valued(cls.model_fields[str(info.field_name)].annotation)
        return [value] if several and isinstance(value, (str, int, float, os.PathLike)) else value

    def problems(self) -> Iterator[str]:
        """Say what of the options contradicts itself or each other."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self.problems():
            raise ValueError(problem)
        return self


def is_multi_valued(annotation: Any) -> bool:
    """Whether it is a list, or a tuple of any length; or one of both and None."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return Ellipsis in arguments
    return get_origin(annotation) is list or any(map(is_multi_valued, arguments))


C = TypeVar("C", bound=Config)
Options = Mapping[str, Any]


def build_config(config_type: type[C], options: Options, path: Path | None = None, typed: Options = {}) -> C:
    """Validate options into a config.

    Args:
        options: field name -> value; the sections of a config are mappings.
        path: the file that `options` came from, for error messages.
        typed: options from the command line, which win over `options`.

    Raises:
        MapetError: options that are unknown, missing or wrong, on one line; it carries the first one's field and value.
    """
    given = merge_options(options, typed)
    for name, inner, by_name in iter_sections(config_type):
        if isinstance(section := given.get(name), Mapping):
            words = typed.get(name, {})
            with spell_in_section(name, config_type.model_fields):
                if not by_name:
                    given[name] = build_config(inner, section, path, words)
                    continue
                given[name] = dict(section)
                for key, one in section.items():
                    if isinstance(one, Mapping):  # else pydantic refuses it
                        with spell_in_section(key):
                            given[name][key] = build_config(inner, one, path, words.get(key, {}))
    try:
        return config_type.model_validate(given)
    except ValidationError as error:
        problems = error.errors()
        text = "; ".join(dict.fromkeys(_explain(config_type, problem, path, typed) for problem in problems))
        field, value = ".".join(map(str, problems[0]["loc"])) or None, problems[0]["input"]
        raise MapetError(text, field=field, value=value, expected=_expected(problems[0])) from None


def merge_options(base: Options, over: Options) -> dict[str, Any]:
    """Merge nested mappings; values of `over` win."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_options(merged[key], value) if both else value
    return merged


EXPECTED = {
    "greater_than": "must be greater than {gt:g}", "greater_than_equal": "must be at least {ge:g}",
    "too_short": "must have at least {min_length}", "less_than": "must be less than {lt:g}", "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"), **dict.fromkeys(("dict_type", "model_type"), "must be a mapping"),
}  # fmt: skip
"""Type of a pydantic error -> what it expected."""


def _expected(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if "error" in context:
        return str(context["error"])
    return EXPECTED.get(problem["type"], problem["msg"]).format(**context)


def _explain(config_type: type[Config], problem: ErrorDetails, path: Path | None, typed: Options) -> str:
    """Say what is wrong with an option, as the user wrote it: in the file, on the command line or in Python."""
    place, kind = problem["loc"], problem["type"]
    in_file = path is not None and bool(place) and place[0] not in typed and kind != "missing"
    where = f" (in {path})" if in_file else ""
    with spell_as_flags(False) if in_file else nullcontext():
        name = option(".".join(map(str, place)))
        if kind == "extra_forbidden":
            return f"unknown option '{name}'{where}{did_you_mean(name, [option(known) for known, _ in iter_options(config_type)])}"
        if kind == "missing":
            description = config_type.model_fields[str(place[0])].description or ""
            return f"{name} is required: {' '.join(description.split()).rstrip('.')}"
        expected = _expected(problem)
        return f"{name}: {expected}, got {problem['input']!r}{where}" if place else f"{expected}{where}"


def iter_sections(config_type: type[Config]) -> Iterator[tuple[str, type[Config], bool]]:
    """Yield (name, config type, whether it is a mapping of names to such configs) of the fields that hold configs."""
    for name, field in config_type.model_fields.items():
        by_name = get_origin(field.annotation) is dict
        kind = get_args(field.annotation)[1] if by_name else field.annotation
        if isinstance(kind, type) and issubclass(kind, Config):
            yield name, kind, by_name


def iter_options(config_type: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, pydantic field) of every option of the command line, those of sections included."""
    inner = {name: kind for name, kind, by_name in iter_sections(config_type) if not by_name}
    for name, field in config_type.model_fields.items():
        if name in inner:
            yield from iter_options(inner[name], f"{prefix}{name}.")
        elif name not in config_type.file_only:
            yield prefix + name, field


def format_none(field: FieldInfo) -> str:
    """Return what None means for an option: 'automatic' where its help says what is chosen then, else 'none'."""
    return "automatic" if "automatic" in (field.description or "") else "none"


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML recipe: a mapping of option names to values."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MapetError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # of bytes that are no text, numbers that are none
        raise MapetError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    if not isinstance(recipe, (dict, NoneType)):
        raise MapetError(f"{path} must be a mapping of options to values, not a {type(recipe).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (recipe or {}).items()}


def write_config(config: Config, path: Path) -> None:
    """Write all options as YAML, atomically."""
    write_text(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe that repeats it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def diff_configs(old: Config, new: Config, ignore: frozenset[str] = frozenset()) -> list[str]:
    """'key: old -> new' for every option that differs, those of a section as 'section.key'; None is what isn't given."""
    a, b = (dict(_flat(config.model_dump(mode="json", exclude=set(ignore)))) for config in (old, new))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in a | b if a.get(key) != b.get(key)]


def _flat(options: Options, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
