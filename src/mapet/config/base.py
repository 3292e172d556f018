"""Configs: one pydantic class per command, filled from a YAML file, the command line or Python keywords.

All three become one mapping that pydantic validates, so that a value means the same wherever it is written.
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
    """Base of every command's config. A field's docstring is its `--help` text, gives units and says what None ("auto") means."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
    positional: ClassVar[str | None] = None
    """The option that arguments without an option name are values of, on the command line."""
    out_is_file: ClassVar[bool] = False
    """Whether `out`, if there is one, names a file; else it is a folder, which gets a run.json."""
    file_only: ClassVar[frozenset[str]] = frozenset()
    """Options that have no flag: Python and config files set them."""

    @field_validator("*", mode="before")
    @classmethod
    def _normalize(cls, value: Any, info: ValidationInfo) -> Any:
        """Read 'none', or 'auto' where the help text says what that means, as None; make one value of a list option a list."""
        field = cls.model_fields[str(info.field_name)]
        single = value[0] if isinstance(value, list) and len(value) == 1 else value  # the command line makes lists
        if single in ("none", format_none(field)) and NoneType in get_args(field.annotation):
            return None
        several = is_multi_valued(field.annotation)
        return [value] if several and isinstance(value, (str, int, float, os.PathLike)) else value

    def problems(self) -> Iterator[str]:
        """Yield a message for each option whose value contradicts itself or another option; the first one is raised."""
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self.problems():
            raise ValueError(problem)
        return self


def is_multi_valued(annotation: Any) -> bool:
    """Return whether a type is a list or a tuple of any length, alone or as one of several alternatives."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return Ellipsis in arguments
    return get_origin(annotation) is list or any(map(is_multi_valued, arguments))


C = TypeVar("C", bound=Config)
Options = Mapping[str, Any]
"""Field name -> value; the value of a section is such a mapping itself."""


def build_config(config_type: type[C], options: Options, path: Path | None = None, typed: Options = {}) -> C:
    """Validate options into a config: first each section, so that its errors name its options, then the whole.

    Args:
        path: the file that `options` were read from, for error messages; None if there is none.
        typed: options from the command line, which replace those of the same name in `options`.

    Raises:
        MapetError: options that are unknown, missing or wrong, on one line; it carries the first one's field, value and what was
            expected.
    """
    merged = merge_options(options, typed)
    for name, section_type, by_name in iter_sections(config_type):
        if isinstance(section := merged.get(name), Mapping):  # pydantic refuses anything else
            build_section = _build_by_name if by_name else build_config
            with spell_in_section(name, config_type.model_fields):
                merged[name] = build_section(section_type, section, path, typed.get(name, {}))
    try:
        return config_type.model_validate(merged)
    except ValidationError as error:
        problems = error.errors()
        text = "; ".join(dict.fromkeys(_explain(config_type, problem, path, typed) for problem in problems))
        field, value = ".".join(map(str, problems[0]["loc"])) or None, problems[0]["input"]
        raise MapetError(text, field=field, value=value, expected=_expected(problems[0])) from None


def _build_by_name(config_type: type[C], options: Options, path: Path | None, typed: Options) -> dict[str, Any]:
    """Validate a mapping of names to the options of a config each; what is no mapping is left for pydantic to refuse."""
    built = dict(options)
    for name, section in options.items():
        if isinstance(section, Mapping):
            with spell_in_section(name):
                built[name] = build_config(config_type, section, path, typed.get(name, {}))
    return built


def merge_options(base: Options, over: Options) -> dict[str, Any]:
    """Return nested mappings merged into a new one; where both have a value, that of `over` is taken."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_options(merged[key], value) if both else value
    return merged


EXPECTED = {
    "greater_than": "must be greater than {gt:g}", "greater_than_equal": "must be at least {ge:g}",
    "too_short": "must have at least {min_length}", "less_than": "must be less than {lt:g}", "less_than_equal": "must be at most {le:g}",
    "value_error": "{error}", "literal_error": "must be {expected}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"), **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"), **dict.fromkeys(("dict_type", "model_type"), "must be a mapping"),
}  # fmt: skip
"""Type of a pydantic error -> what was expected, a template of the error's context."""


def _expected(problem: ErrorDetails) -> str:
    """Return what an option should have been: the message of a validator of mapet's, or `EXPECTED`, or pydantic's own text."""
    context = problem.get("ctx", {})
    return EXPECTED.get(problem["type"], problem["msg"]).format(**context)


def _explain(config_type: type[Config], problem: ErrorDetails, path: Path | None, typed: Options) -> str:
    """Return one message for a pydantic error; it spells the option as the user wrote it and names the file, if it is there.

    Args:
        path: the config file, or None.
        typed: the options of the command line; all others come from the file.
    """
    location, kind = problem["loc"], problem["type"]
    in_file = path is not None and bool(location) and location[0] not in typed and kind != "missing"
    where = f" (in {path})" if in_file else ""
    with spell_as_flags(False) if in_file else nullcontext():
        name = option(".".join(map(str, location)))
        if kind == "extra_forbidden":
            known = [option(known) for known, _ in iter_options(config_type)]
            return f"unknown option '{name}'{where}{did_you_mean(name, known)}"
        if kind == "missing":
            description = config_type.model_fields[str(location[0])].description or ""
            return f"{name} is required: {' '.join(description.split()).rstrip('.')}"
        expected = _expected(problem)
        return f"{name}: {expected}, got {problem['input']!r}{where}" if location else f"{expected}{where}"


def iter_sections(config_type: type[Config]) -> Iterator[tuple[str, type[Config], bool]]:
    """Yield (name, config type, by_name) of the fields that hold configs; by_name: a mapping of the user's names to such configs."""
    for name, field in config_type.model_fields.items():
        by_name = get_origin(field.annotation) is dict
        section_type = get_args(field.annotation)[1] if by_name else field.annotation
        if isinstance(section_type, type) and issubclass(section_type, Config):
            yield name, section_type, by_name


def iter_options(config_type: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, pydantic field) of every option of the command line, e.g. 'pretrain.lr' for one of a section."""
    section_types = {name: section_type for name, section_type, by_name in iter_sections(config_type) if not by_name}
    for name, field in config_type.model_fields.items():
        if name in section_types:
            yield from iter_options(section_types[name], f"{prefix}{name}.")
        elif name not in config_type.file_only:
            yield prefix + name, field


def format_none(field: FieldInfo) -> str:
    """Return what None is called for an option: 'auto' where its help text says what is chosen then ("auto: ..."), else 'none'."""
    return "auto" if "auto:" in (field.description or "") else "none"


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of option names and values; dashes in names become underscores.

    Raises:
        MapetError: it cannot be read, is not valid YAML, or is no mapping.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MapetError(f"cannot read the config {path}: {error.strerror}. Check the path") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # PyYAML lets out those of int() and text
        raise MapetError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    if not isinstance(options, (dict, NoneType)):
        raise MapetError(f"{path} must hold options as `name: value`, not a {type(options).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (options or {}).items()}


def write_config(config: Config, path: Path) -> None:
    """Write all options as YAML, atomically."""
    write_text(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """Return the YAML text that `read_config` and `build_config` turn into the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def diff_configs(old: Config, new: Config, ignore: frozenset[str] = frozenset()) -> list[str]:
    """Return 'key: old -> new' for every option that differs, those of a section as 'section.key'.

    Args:
        ignore: fields, whole sections among them, that are not compared. An option that one config does not have is None there.
    """
    a, b = (dict(_flatten(config.model_dump(mode="json", exclude=set(ignore)))) for config in (old, new))
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in a | b if a.get(key) != b.get(key)]


def _flatten(options: Options, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of all values in nested mappings."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
