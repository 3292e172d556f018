"""`mapet COMMAND [config.yaml] --option value`: turns arguments into a config and calls the command. No logic."""

import argparse
import inspect
import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import shtab
from pydantic.fields import FieldInfo

import mapet
from mapet.commands import COMMANDS, GROUPS
from mapet.commands.command import AnyCommand, command_name, silence_stdout, summary
from mapet.config.base import (
    Config,
    build_config,
    format_none,
    is_multi_valued,
    iter_options,
    iter_sections,
    parse_yaml,
    read_config,
)
from mapet.config.shared import trust_teachers
from mapet.errors import Interrupted, MapetError, did_you_mean, option, os_error_hint, spell_as_flags
from mapet.run_state import CONFIG_FILE, find_config, is_first_rank, read_command
from mapet.signals import RESUME_HINT, SIGINT_EXIT_CODE

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
EPILOG = """\
example:
  mapet run --images PHOTOS --out RUN     all of it with defaults
  mapet COMMAND --help                    options, defaults and an example
  source <(mapet completion bash)         let the shell complete commands and options (or zsh, fish, ...)"""
HEADINGS = {
    "Data": "run bundle images test_images group_by ood_images channels bands pages value_range max_unreadable views min_crop_scale num_views "
    "color_jitter seg_masks test_seg_masks ignore_labels annotations test_annotations short_side streaming labels_per_class num_seeds",
    "Model": "backbone model model_args image_size patch_size init_from from_scratch decoder_depth drop_path layer_scale_init pool layers "
    "format dtype",
    "Tokenizer": "tokenizer tokens trust_teacher sample teacher teacher_checkpoint teacher_image_size teacher_layer teacher_output "
    "quantizer vocab_size fsq_levels pca_dim patches_per_code",
    "K-means": "kmeans_iters",
    "Objective": "objective target mask_ratio patch_order num_predict separate_query_token",
    "Optimization": "time opt epochs warmup_epochs batch_size lr min_lr weight_decay clip_grad seed",
    "Regularization": "rand_augment mixup cutmix random_erasing label_smoothing layer_decay ema_decay",
    "Protocols": "protocols controls few_shot eval_image_sizes",
    "Search": "query features num_neighbors min_similarity",
    "Study": "tokenizers grid seeds compare_by equal_compute report_only devices",
    "Hardware": "device precision micro_batch_size compile fsdp memory_gb",
    "Limits": "limits image_pixels image_bytes image_seconds archive_members archive_bytes read_timeout",
    "Output": "out license resume take_over figures figures_dir serve checkpoint_interval_min max_rollbacks log_interval probe_every probe_images "
    "track",
}
"""Heading -> its options, in the order of `--help`; the same for every command, since an option has one meaning everywhere."""
HEADING_BY_OPTION = {name: heading for heading, names in HEADINGS.items() for name in names.split()}
OPTION_ORDER = list(HEADING_BY_OPTION)
BASIC_OPTIONS = """images test_images backbone run tokenizer tokens teacher model image_size patch_size objective target mask_ratio quantizer
vocab_size views protocols labels_per_class tokenizers grid time epochs batch_size lr device out resume query"""
"""Options that the short `--help` shows, beside required ones, if a command has more than `MAX_BASIC_OPTIONS` of its own."""
MAX_BASIC_OPTIONS = 15
SIGPIPE_EXIT_CODE = 141
"""128 + SIGPIPE, as shells report a process whose reader has closed the pipe."""


def main(argv: list[str] | None = None) -> int:
    """Run one command of the command line; print an error that the user can correct on one line of stderr, without a traceback.

    Args:
        argv: the command's name and its arguments, e.g. ['check', '--images', 'photos']; None: the arguments of this process. No
            argument at all prints the overview of all commands.

    Returns:
        The exit code: 0 for success; 2 for a `MapetError` or an error of the operating system; 130 if Ctrl-C or another signal
        stopped the command; 141 if the reader of stdout has closed the pipe. Other exceptions are bugs, and are not caught.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # started without one: its descriptor would go to the next file that is opened
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
        if isinstance(getattr(sys, stream), io.TextIOWrapper):  # names of files may be in any encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures are written to files; in Python, its user chooses the backend
    name = argv[0] if argv else "help"
    try:
        with spell_as_flags():
            if name in ("-h", "--help", "help"):
                print(overview())
            elif name in ("-V", "--version"):
                print(f"mapet {mapet.__version__}")
            elif name == "completion":
                print(completion(argv[1] if len(argv) > 1 else Path(os.environ.get("SHELL", "bash")).name), end="")
            else:
                run_command(name, argv[1:])
        sys.stdout.flush()
    except MapetError as error:
        if is_first_rank() or not isinstance(error, Interrupted):  # all ranks are interrupted: one of them reports it
            print(f"mapet {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mapet {name}: interrupted", file=sys.stderr)
        return SIGINT_EXIT_CODE
    except BrokenPipeError:  # e.g. `| head`
        silence_stdout()
        return SIGPIPE_EXIT_CODE
    except OSError as error:  # disk full, permission denied, ...
        text = f"cannot access {error.filename or 'a file'} ({error.strerror or error}){os_error_hint(error.errno)}"
        print(f"mapet {name}: {text}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """Return the text of `mapet --help`: usage, what mapet is, each command under its heading with its summary, and examples."""
    about = (mapet.__doc__ or "").split("\n")[0].removeprefix("mapet: ")
    lines = ["usage: mapet COMMAND [config.yaml] [--option value ...]", "", about, ""]
    for heading, functions in GROUPS.items():
        lines += [f"{heading}:", *(f"  {command_name(function):<20}{summary(function)}" for function in functions), ""]
    return "\n".join([*lines, EPILOG])


def completion(shell: str) -> str:
    """Return the script that makes a shell complete mapet's commands and options when the user presses Tab.

    Args:
        shell: a shell that the library shtab supports, e.g. 'bash'.

    Raises:
        MapetError: unknown shell.
    """
    if shell not in (known := shtab.SUPPORTED_SHELLS):
        raise MapetError(f"no completion for '{shell}'{did_you_mean(shell, known) or '.'} Shells: {', '.join(known)}")
    root = argparse.ArgumentParser(prog="mapet")
    commands = root.add_subparsers()
    for name, function in COMMANDS.items():
        commands.add_parser(name, help=summary(function), parents=[create_parser(function)], add_help=False)
    return shtab.complete(root, shell)


def run_command(name: str, argv: list[str]) -> Any:
    """Call a command with its arguments and return its result; with `--help` or `--help-all` only print its options, return None.

    Options are read from the config file, if one is given, and replaced by options of the command line. A file of the name
    config.yaml is one that a run wrote into its own folder.

    Args:
        name: the command's name, e.g. 'fit-tokenizer'.
        argv: the arguments after the name, e.g. ['runs/a/config.yaml', '--resume'].

    Returns:
        What the command returns; None after help.

    Raises:
        MapetError: an unknown command; unknown, missing or wrong options; the config of another command; or a run to resume that
            is not in the folder that `out` names. Errors of the command itself pass unchanged.
    """
    if name not in COMMANDS:
        raise MapetError(
            f"unknown command '{name}'{did_you_mean(name, COMMANDS) or '.'} Commands: {', '.join(COMMANDS)}"
        )
    function, config_type = COMMANDS[name], COMMANDS[name].config_type
    if {"--help-all", "--help", "-h"} & set(argv):
        print(create_parser(function, hide="--help-all" not in argv).format_help(), end="")
        return None
    path, typed = _parse_arguments(function, argv)
    written_by = read_command(path.parent) if path and path.name == CONFIG_FILE else ""
    try:
        config = build_config(config_type, read_config(path) if path else {}, path, typed)
    except MapetError:
        if written_by not in ("", name):
            raise MapetError(f"{path} is a config of `mapet {written_by}`, not of `mapet {name}`") from None
        raise
    # for Ctrl-C while the command imports its libraries, when it has saved nothing
    RESUME_HINT[0] = "the same command, with --resume if it had started" if "resume" in config_type.model_fields else ""
    out = getattr(config, "out", None) if getattr(config, "resume", False) else None
    # a relative `out` is wrong in another working directory than the run's, and so is any `out` once the run's folder has been moved
    if path and out and written_by and path.parent.resolve() != out.resolve():
        problem = f"{path} is the config of the run in {path.parent}, but its {option('out')} is {out}"
        moved = f"if the run was moved, give {option('out')} {quote(str(path.parent))}"
        if out.is_absolute():
            raise MapetError(f"{problem}: {moved}")
        raise MapetError(
            f"{problem}, relative to {Path.cwd()}: change to the directory that the run was started in, or {moved}"
        )
    with trust_teachers(typed):
        return function(config)


def _parse_arguments(function: AnyCommand, argv: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """Split a command's arguments into the config file, if one is given, and the options.

    An unnamed argument is one that no option name precedes: `mapet report report.yaml runs/a runs/b` has three. The first is the
    config file if it has a suffix of `CONFIG_SUFFIXES`, or if the command's config has no `positional` option; the others are
    the values of that option, here `run`.

    Args:
        function: the command.
        argv: its arguments, after its name.

    Returns:
        The path of the config file or None; and field name -> value of each option that was given. Values are as the parser
        leaves them, before pydantic converts them: text, a list of texts, a bool of a flag such as `--resume`, or a dict of
        KEY=VALUE pairs. Options of a section, e.g. `--pretrain.lr 1`, are a dict under its name: {'pretrain': {'lr': '1'}}.

    Raises:
        MapetError: an unknown option; too many unnamed arguments, or some beside the same option by name; a value that the parser
            refuses; a config file that is a folder or has none of those suffixes.
    """
    name, config_type = command_name(function), function.config_type
    namespace, unknown = create_parser(function).parse_known_args(argv)
    options = vars(namespace)
    unnamed, positional, path = options.pop("unnamed", []), config_type.positional, None
    takes_several = positional is not None and is_multi_valued(config_type.model_fields[positional].annotation)
    if unnamed and (positional is None or Path(unnamed[0]).suffix in CONFIG_SUFFIXES):
        path = Path(unnamed.pop(0))
    max_unnamed = len(unnamed) if takes_several else int(positional is not None)
    if unknown := [*unknown, *unnamed[max_unnamed:]]:
        raise MapetError(_explain_unknown(name, unknown[0]))
    if unnamed and positional in options:
        raise MapetError(f"'{' '.join(unnamed)}' and {option(positional)} are mutually exclusive: give one of them")
    if unnamed and positional:
        options[positional] = unnamed if takes_several else unnamed[0]
    typed: dict[str, Any] = {}
    for dotted, value in options.items():
        section, _, last = dotted.rpartition(".")  # section is '' for an option of the command itself
        value = dict(value) if isinstance(value, list) and isinstance(value[0], tuple) else value  # KEY=VALUE pairs
        (typed.setdefault(section, {}) if section else typed)[last] = value
    if path and path.is_dir():
        raise MapetError(f"{path} is a folder, not a config: {_suggest_option(name, path, 'resume' in typed)}")
    if path and path.suffix.lower() not in CONFIG_SUFFIXES:
        raise MapetError(f"{path} is not a config (.yaml): options are written --name value, see `mapet {name} --help`")
    return path, typed


def _explain_unknown(name: str, argument: str) -> str:
    """Return the error message for an argument that a command does not take; it suggests similar options.

    Args:
        name: the command's name, e.g. 'fit-tokenizer'.
        argument: as the user typed it, e.g. '--epoch' or '--epoch=3'.
    """
    if not argument.startswith("--"):
        return f"unexpected argument '{argument}'; options are written --name value, see `mapet {name} --help`"
    flag, config_type = argument.split("=")[0].replace("_", "-"), COMMANDS[name].config_type
    *sections, field = flag[2:].replace("-", "_").split(".")
    section_type: type[Config] | None = config_type
    for section in sections:
        section_type = (
            {key: each for key, each, _ in iter_sections(section_type)}.get(section) if section_type else None
        )
    if section_type and field in section_type.file_only:
        line = "".join(f"{section}: {{" for section in sections) + f"{field}: VALUE" + "}" * len(sections)
        return f"{flag} is for config files only: `mapet {name} config.yaml`, with a line `{line}` in it"
    known = [option(known) for known, _ in iter_options(config_type)]
    return f"unknown option '{flag}'{did_you_mean(flag, known) or '.'} See `mapet {name} --help`"


def _suggest_option(name: str, folder: Path, resume: bool) -> str:
    """Return the next step for a message about a folder that was given where a config file is expected.

    Args:
        name: the command's name, e.g. 'fit-tokenizer'.
        folder: an existing folder.
        resume: whether `--resume` or `--no-resume` was given.

    Returns:
        'did you mean FOLDER/config.yaml?' if this command wrote that file; else 'give it as --OPTION FOLDER', with the first of
        the options `out` (to resume), `tokenizer` (for the folder of a tokenizer), `run`, `backbone`, `bundle`, `images`, `out`
        that the command has.
    """
    if config := find_config(folder, (name,)):
        return f"did you mean {config[1]}?"
    is_tokenizer = (folder / "visual_tokenizer.json").is_file()
    likely = ["run", "backbone", "bundle"]
    if resume:
        likely = ["out"]
    elif is_tokenizer:
        likely = ["tokenizer"]
    fields = COMMANDS[name].config_type.model_fields
    field = next(field for field in [*likely, "images", "out"] if field in fields)
    return f"give it as {option(field)} {quote(str(folder))}"


class _Parser(argparse.ArgumentParser):
    """A parser that raises MapetError for wrong arguments, where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of argparse as a MapetError."""
        raise MapetError(f"{message}. See `{self.prog} --help`")


def create_parser(function: AnyCommand, hide: bool = False) -> argparse.ArgumentParser:
    """Create the argument parser of a command: an option for each field of its config class, under the headings of `HEADINGS`.

    A field that holds a config itself is a section, e.g. `pretrain` of the command `run`: each of its fields is an option with
    its name, `--pretrain.lr`. After the command's own options comes the group 'Options of SECTION' of each section.

    The parsed namespace has an attribute for each option that was given, and none for the others: field name, or 'section.field',
    -> text, list of texts, bool or (KEY=VALUE) list of pairs. Arguments without an option name are the list `unnamed`. Wrong
    arguments raise MapetError.

    Args:
        function: the command. Its docstring is the description and, below 'Example:', the example of the help text.
        hide: omit some options from the help text, as `--help` does; the parser still takes them. Omitted are all options of
            sections and, if the command has more than `MAX_BASIC_OPTIONS` of its own, those that are neither required nor in
            `BASIC_OPTIONS`. False: show all, as `--help-all` does.

    Returns:
        The parser.
    """
    config_type, name = function.config_type, command_name(function)
    description, _, example = (inspect.getdoc(function) or "").partition("Example:")
    positional = f" [{config_type.positional.upper()} ...]" if config_type.positional else ""
    parser = _Parser(
        prog=f"mapet {name}", usage=f"mapet {name} [config.yaml]{positional} [--option value ...]", description=description.strip(),
        epilog=f"example:\n{example.strip(chr(10))}", formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.add_argument("unnamed", nargs="*", help=argparse.SUPPRESS)
    # (section or '', field name, 'section.field' or field name, field); sorting puts the command's own options, of section '', first
    options = [(*dotted.rpartition(".")[::2], dotted, field) for dotted, field in iter_options(config_type)]
    options.sort(key=lambda item: (item[0], OPTION_ORDER.index(item[1])))
    has_few = sum(not section for section, *_ in options) <= MAX_BASIC_OPTIONS
    groups: dict[str, Any] = {}
    flags = {dotted: f"--{dotted.replace('_', '-')}" for _, _, dotted, _ in options}
    for section, field_name, dotted, field in options:
        heading = f"Options of {section.replace('_', '-')}" if section else HEADING_BY_OPTION[field_name]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        is_basic = not section and (has_few or field_name in BASIC_OPTIONS.split() or field.is_required())
        keywords = _argparse_keywords(field.annotation)
        names = {name.removeprefix(f"{section}."): flag for name, flag in flags.items()}
        keywords["help"] = _help_text(field, names) if is_basic or not hide else argparse.SUPPRESS
        groups[heading].add_argument(flags[dotted], dest=dotted, **keywords)
    help_group = parser.add_argument_group("Help")
    help_group.add_argument("-h", "--help", action="help", help="The most used options.")
    help_group.add_argument("--help-all", action="help", help="All options (of run and study also --STAGE.option).")
    return parser


def _help_text(field: FieldInfo, flags: Mapping[str, str]) -> str:
    """Return the help text of an option: its description on one line, and '(required)' or '(default: VALUE)'.

    Names of other options in the description, `lr`, are written as their flags, --pretrain.lr.

    The default is written as on the command line: 'auto' or 'none' for None, 'false', '0.01 0.1 5' for a sequence. An empty one
    is not shown.

    Args:
        field: pydantic's field of the option; its description is the docstring below it.
        flags: name of an option, as descriptions have it between backticks, -> its flag; other names stay as they are.
    """
    description = " ".join((field.description or "").split()).replace("%", "%%")  # argparse formats help texts by %
    description = re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), description)
    if field.is_required():
        return f"{description} (required)"
    default = field.get_default(call_default_factory=True)
    text = format_none(field) if default is None else str(default)
    if isinstance(default, (tuple, list, dict)):
        text = " ".join(map(str, default))
    return f"{description} (default: {text.lower() if isinstance(default, bool) else text})" if text else description


def _parse_key_value(argument: str) -> tuple[str, Any]:
    """Parse 'KEY=VALUE' into the key and the value, which is read as YAML ('4' is a number), or is plain text if it is no valid YAML.

    Raises:
        ArgumentTypeError: no '='; or a mapping without a space after a colon, '{a:1}', which YAML reads as the key 'a:1' with the
            value None.
    """
    key, equals, text = argument.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes KEY=VALUE pairs, got '{argument}'")
    try:
        value = parse_yaml(text)
    except ValueError:
        return key, text
    if isinstance(value, dict) and any(inner is None and ":" in str(name) for name, inner in value.items()):
        raise argparse.ArgumentTypeError(f"'{argument}': YAML needs a space after each colon, e.g. {{lr: 0.1}}")
    return key, value


def _argparse_keywords(annotation: Any) -> dict[str, Any]:
    """Return the keywords of argparse's `add_argument` for an option: choices, metavar, nargs, type, action.

    Values stay text, which pydantic converts later, except for flags (bool) and KEY=VALUE pairs (dict).

    Args:
        annotation: the field's type, e.g. `int`, `Path | None`, `list[str]`, `Literal["l2", "cosine"]`, `dict[str, Any]`.
    """
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Literal:
        return {"choices": [str(part) for part in parts], "metavar": "{" + ",".join(map(str, parts)) + "}"}
    if origin is dict:
        return {"metavar": "KEY=VALUE", "nargs": "+", "type": _parse_key_value}
    if origin in (tuple, list):
        return _argparse_keywords(parts[0]) | {"nargs": "+"}
    if bool in (annotation, *parts):
        return {"action": argparse.BooleanOptionalAction}
    if parts:  # Annotated[type, validators], or alternatives, of which the first is shown
        return _argparse_keywords(parts[0])
    return {"metavar": {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}.get(annotation, "VALUE")}
