"""Configs: one pydantic class per command, filled from a YAML file, the command line or Python keywords.

All three become one mapping that pydantic validates, so that a value means the same wherever it is written.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mapet.errors import MapetError, did_you_mean, option, spell_as_flags, spell_in_section
from mapet.files import RUN_FILE, read_json, write_text

MAX_INT = 2**63 - 1
"""Largest whole number of an option: that of 64 bits."""
MAX_YAML_VALUES = 100_000
"""Most values of a config file; an alias counts as all that it stands for, so that nested ones cannot fill the memory."""
MAX_YAML_ERROR_CHARS = 500
"""Characters of the YAML parser's error that are quoted."""


class Config(BaseModel):
    """Base class of the configs of commands and of their sections; immutable, and unknown options are refused.

    A section is a field that is a config itself, e.g. `pretrain` of `RunConfig`. The docstring below a field is the option's
    `--help` text: it gives the unit, and what None means, as "auto: ..." or "none: ...".
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )
    positional: ClassVar[str | None] = None
    """The option that arguments without an option name are values of, on the command line."""
    out_is_file: ClassVar[bool] = False
    """Whether `out`, if there is one, names a file; else it is a folder, which gets a run.json."""
    file_only: ClassVar[frozenset[str]] = frozenset()
    """Options that have no flag: Python and config files set them."""

    @field_validator("*", mode="before")
    @classmethod
    def _normalize(cls, value: object, info: ValidationInfo) -> object:
        """Return the value of any field as pydantic shall validate it.

        Of a field that may be None, 'none' becomes None, and so does 'auto' where the help text has "auto: ...". Of a list or
        tuple field, a single value becomes a list of it. Other values stay as they are.

        Raises:
            ValueError: the value is an empty text, as of a shell variable that is not set: a path would mean the working folder.
        """
        if value in ("", [""]):
            raise ValueError("must not be empty")
        field = cls.model_fields[str(info.field_name)]
        single = value[0] if isinstance(value, list) and len(value) == 1 else value  # the command line makes lists
        if single in ("none", format_none(field)) and NoneType in get_args(field.annotation):
            return None
        is_single = isinstance(value, (str, int, float, os.PathLike))
        return [value] if is_single and is_multi_valued(field.annotation) else value

    @field_validator("*")
    @classmethod
    def _check_size(cls, value: object) -> object:
        """Return the value of any field; refuse whole numbers that no library can hold, as of 30 digits."""
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, int) and abs(item) > MAX_INT:
                raise ValueError(f"must be at most {MAX_INT}")
        return value

    @classmethod
    def expand(cls, options: "Options") -> dict[str, Any]:
        """Return options as they are validated; subclasses override this where an option stands for one of a section.

        Args:
            options: field name -> value as given; the value of a section is such a mapping itself.
        """
        return dict(options)

    def problems(self) -> Iterator[str]:
        """Yield an error message for each value that is invalid or contradicts another option's; subclasses override this.

        It is called after pydantic has validated each field by itself. The first message becomes the error.
        """
        yield from ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self.problems():
            raise ValueError(problem)
        return self


def is_multi_valued(annotation: object) -> bool:
    """Return whether a field's type is a list or a tuple of any length, also as an alternative: `list[str] | None`.

    False for a tuple of fixed length, e.g. height and width.
    """
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return Ellipsis in arguments
    return get_origin(annotation) is list or any(map(is_multi_valued, arguments))


C = TypeVar("C", bound=Config)
Options = Mapping[str, Any]
"""Field name -> value; the value of a section is such a mapping itself."""


def build_config(config_type: type[C], options: Options, path: Path | None = None, typed: Options = {}) -> C:
    """Validate options into a config: first each section, so that errors name its options (`--pretrain.lr`), then the whole.

    Args:
        config_type: the class of the config.
        options: field name -> value, from Python or a config file; the value of a section is such a mapping itself.
        path: the file that `options` were read from, for error messages; None: from Python or the command line.
        typed: options from the command line, of the same form; they replace those of the same name in `options`.

    Returns:
        The config.

    Raises:
        MapetError: options that are unknown, missing or invalid; the message lists all of them on one line. `field`, `value` and
            `expected` of the error are the first one's.
    """
    typed = config_type.expand(typed)
    merged = merge_options(config_type.expand(options), typed)
    for name, section_type, by_name in iter_sections(config_type):
        if isinstance(section := merged.get(name), Mapping):  # pydantic refuses anything else
            build_section = _build_by_name if by_name else build_config
            with spell_in_section(name, config_type.model_fields.keys() - section_type.model_fields.keys()):
                merged[name] = build_section(section_type, section, path, typed.get(name, {}))
    try:
        return config_type.model_validate(merged)
    except ValidationError as error:
        all_problems = error.errors()
        # A list is too short for pydantic, too, where an invalid item of it does not count.
        lists = {problem["loc"][:-1] for problem in all_problems if len(problem["loc"]) > 1}
        problems = [problem for problem in all_problems if problem["loc"] not in lists]
        text = "; ".join(dict.fromkeys(_explain(config_type, problem, path, typed) for problem in problems))
        if path is not None and any(problem["type"] == "extra_forbidden" for problem in problems):
            text += _version_hint(path)
        field, value = _option_name(problems[0]) or None, problems[0]["input"]
        raise MapetError(text, field=field, value=value, expected=_expected_value(problems[0])) from None


def _build_by_name(config_type: type[C], options: Options, path: Path | None, typed: Options) -> dict[str, Any]:
    """Validate a section that maps names of the user to configs, e.g. `tokenizers` of `StudyConfig`.

    Args:
        config_type: the class of each config.
        options: name -> options of the config of that name. A value that is no mapping is returned unchanged: pydantic refuses it.
        path: the file that `options` were read from, or None.
        typed: options from the command line, already merged into `options`; by name, too.

    Returns:
        Name -> config.
    """
    built = dict(options)
    for name, section in options.items():
        if isinstance(section, Mapping):
            with spell_in_section(name):
                built[name] = build_config(config_type, section, path, typed.get(name, {}))
    return built


def merge_options(base: Options, overrides: Options) -> dict[str, Any]:
    """Merge two nested mappings of options into a new one; where both have a value that is no mapping, take the one of `overrides`."""
    merged = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_options(merged[key], value) if both else value
    return merged


EXPECTED = {
    "greater_than": "must be greater than {gt:g}", "greater_than_equal": "must be at least {ge:g}",
    "too_short": "must have {min_length} or more values", "less_than": "must be less than {lt:g}", "less_than_equal": "must be at most {le:.15g}",
    "too_long": "must have at most {max_length} values", "value_error": "{error}", "literal_error": "must be {expected}",
    "string_type": "must be a text", "finite_number": "must be a finite number",
    "missing": "must have more values",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"), **dict.fromkeys(("dict_type", "model_type"), "must be a mapping"),
}  # fmt: skip
"""Type of a pydantic error -> what the value must be; the fields in braces are keys of the error's `ctx`."""


def _version_hint(path: Path) -> str:
    """Return that another version of mapet wrote the folder of a config, by the run.json in it, and what to do; '' if none did."""
    try:
        written_by = read_json(path.with_name(RUN_FILE), "run state")["versions"]["mapet"]
    except (MapetError, KeyError, TypeError):  # there is none, or it is damaged
        return ""
    if written_by == (present := version("mapet")):
        return ""
    hint = (
        "resume it with that version, or start a new run in another folder by a copy of the file without these options"
    )
    return f": mapet {written_by} wrote {path.parent}, this is mapet {present}: {hint}"


def _option_name(problem: ErrorDetails) -> str:
    """Return the name of the option that pydantic's error is about, nested names joined by dots; '' if it is about several options.

    An error about an item of a list, or about one alternative of a type, is about the option as a whole.
    """
    return ".".join(str(part) for part in takewhile(lambda part: isinstance(part, str), problem["loc"]))


def _expected_value(problem: ErrorDetails) -> str:
    """Return what an option's value must be, e.g. 'must be at least 1': from `EXPECTED` by the type of pydantic's error, else pydantic's text.

    The text of a ValueError that mapet's own validators raise is returned as it is.
    """
    context = problem.get("ctx", {})
    return EXPECTED.get(problem["type"], problem["msg"]).format(**context)


def _explain(config_type: type[Config], problem: ErrorDetails, path: Path | None, typed: Options) -> str:
    """Return the message for one error of pydantic: the option as the user wrote it, what is expected, the value and its file.

    Args:
        config_type: the config that was validated.
        problem: pydantic's error: its type, its location (names of nested fields; empty if it is about several options) and value.
        path: the config file, or None.
        typed: the options of the command line; all others come from the file, if there is one.
    """
    location, kind = problem["loc"], problem["type"]
    in_file = path is not None and bool(location) and location[0] not in typed and kind != "missing"
    where = f" (in {path})" if in_file else ""
    with spell_as_flags(False) if in_file else nullcontext():
        name = option(_option_name(problem))
        if kind == "extra_forbidden":
            known = [option(known) for known, _ in iter_options(config_type)]
            return f"unknown option '{name}'{where}{did_you_mean(name, known)}"
        if kind == "missing" and len(location) == 1:
            description = config_type.model_fields[str(location[0])].description or ""
            return f"{name} is required: {' '.join(description.split()).rstrip('.')}"
        expected = _expected_value(problem)
        return f"{name}: {expected}, got {problem['input']!r}{where}" if location else expected


def iter_sections(config_type: type[Config]) -> Iterator[tuple[str, type[Config], bool]]:
    """Yield (field name, config class, by_name) of the sections of a config, which are its fields that hold configs.

    by_name is False where the field is one config, True where it maps names of the user to configs (`tokenizers` of `study`).
    """
    for name, field in config_type.model_fields.items():
        by_name = get_origin(field.annotation) is dict
        section_type = get_args(field.annotation)[1] if by_name else field.annotation
        if isinstance(section_type, type) and issubclass(section_type, Config):
            yield name, section_type, by_name


def iter_options(config_type: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (name, pydantic field) of every option of the command line; the name of a section's option is dotted, 'pretrain.lr'.

    Fields in `file_only` are excluded. A field that maps names to configs is one option.

    Args:
        config_type: the config class.
        prefix: text before each name, e.g. 'pretrain.'.
    """
    section_types = {name: section_type for name, section_type, by_name in iter_sections(config_type) if not by_name}
    for name, field in config_type.model_fields.items():
        if name in section_types:
            yield from iter_options(section_types[name], f"{prefix}{name}.")
        elif name not in config_type.file_only:
            yield prefix + name, field


def format_none(field: FieldInfo) -> str:
    """Return how the user writes None for an option: 'auto' if its help text contains "auto:" (what is chosen then), else 'none'."""
    return "auto" if "auto:" in (field.description or "") else "none"


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of option names and values; an empty file gives {}.

    Dashes in the names of the top level become underscores, as in field names.

    Raises:
        MapetError: the file cannot be read, is not valid YAML, or holds no mapping.
    """
    try:
        options = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MapetError(f"cannot read the config {path} ({error.strerror or error}): check the path") from None
    except ValueError as error:
        problem = " ".join(str(error).split())[:MAX_YAML_ERROR_CHARS]
        raise MapetError(f"{path} is not valid YAML: {problem}: correct the file") from None
    if not isinstance(options, (dict, NoneType)):
        raise MapetError(f"{path} must hold a mapping, one `name: value` a line, but holds a {type(options).__name__}")
    return {str(key).replace("-", "_"): value for key, value in (options or {}).items()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes no Python objects; 1e-5 is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text '1e-5' in quotes."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; no Python objects are made.

    Raises:
        ValueError: it is no valid YAML, has numbers, dates or nesting that Python cannot represent, has more than `MAX_YAML_VALUES`
            values, or a mapping has a key twice.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _check_yaml_nodes(node)
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, OverflowError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _check_yaml_nodes(root: yaml.Node | None) -> None:
    """Check a parsed YAML document before values are made of it, see `parse_yaml`; aliases are followed, also where they never end.

    Args:
        root: of the document; None for an empty one.

    Raises:
        ValueError: a key is given twice in one mapping, or there are too many values.
    """
    pending, count = [root], 0
    while pending:
        node, count = pending.pop(), count + 1
        if count > MAX_YAML_VALUES:
            raise ValueError(
                f"more than {MAX_YAML_VALUES:,} values, of which aliases (*name) count as what they stand for"
            )
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise ValueError(f"'{key.value}' is given twice, again in line {key.start_mark.line + 1}")
                keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                pending += [key, value]


def write_config(config: Config, path: Path, exclude: Mapping[str, Any] = {}) -> None:
    """Write all options, defaults included, to a YAML file, atomically; except for those in `exclude`, as pydantic takes it."""
    write_text(path, to_yaml(config, exclude))


def to_yaml(config: Config, exclude: Mapping[str, Any] = {}) -> str:
    """Return the YAML text that `read_config` and `build_config` turn into the same config."""
    return dump_yaml(config.model_dump(mode="json", exclude=dict(exclude)))


def dump_yaml(value: object) -> str:
    """Return the YAML text that `parse_yaml` reads as this value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def diff_configs(old: Config, new: Config, ignore: frozenset[str] = frozenset()) -> list[str]:
    """Return 'name: old value -> new value' for every option that differs; an option of a section is named 'section.name'.

    Values are compared and shown as JSON values. An option that one of the configs does not have counts as None there.

    Args:
        old, new: the configs.
        ignore: names of fields of the top level, sections among them, that are not compared.
    """
    old_values, new_values = (
        dict(_flatten(config.model_dump(mode="json", exclude=set(ignore)))) for config in (old, new)
    )
    differing = [name for name in old_values | new_values if old_values.get(name) != new_values.get(name)]
    return [f"{name}: {old_values.get(name)!r} -> {new_values.get(name)!r}" for name in differing]


def _flatten(options: Options, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value), e.g. ('pretrain.lr', 0.1), of all values in nested mappings that are no mappings themselves.

    Args:
        options: the outer mapping.
        prefix: text before each name, e.g. 'pretrain.'.
    """
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
