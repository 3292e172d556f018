"""`mapet COMMAND [config.yaml] --option value`: turns arguments into a config and calls the command. No logic."""

import argparse
import inspect
import os
import sys
from pathlib import Path
from shlex import quote
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import shtab
import yaml
from pydantic.fields import FieldInfo

import mapet
from mapet.commands import COMMANDS, GROUPS
from mapet.commands.command import AnyCommand, command_name, summary
from mapet.config.base import build_config, format_none, is_multi_valued, iter_options, read_config
from mapet.errors import Interrupted, MapetError, did_you_mean, option, os_error_hint, spell_as_flags
from mapet.run_state import CONFIG_FILE, find_config, is_first_rank, read_command
from mapet.signals import RESUME_HINT

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
EPILOG = """\
example:
  mapet run --images PHOTOS --out RUN     all of it with defaults
  mapet COMMAND --help                    options, defaults and an example
  source <(mapet completion bash)         let the shell complete commands and options (or zsh, fish, ...)"""
HEADINGS = {
    "Data": "run bundle images test_images ood_images channels max_unreadable value_range views min_crop_scale num_views color_jitter seg_masks "
    "test_seg_masks ignore_labels annotations test_annotations short_side streaming labels_per_class num_seeds",
    "Model": "backbone model model_args image_size patch_size init_from from_scratch decoder_depth drop_path layer_scale_init pool format dtype",
    "Tokenizer": "tokenizer tokens trust_teacher sample teacher teacher_checkpoint teacher_image_size teacher_layer teacher_final_norm "
    "quantizer vocab_size fsq_levels pca_dim patches_per_code codebook_dim dead_code_threshold",
    "K-means": "kmeans_init kmeans_iters kmeans_n_init kmeans_batch_size kmeans_metric",
    "Objective": "objective target mask_ratio patch_order num_predict separate_query_token",
    "Optimization": "opt epochs warmup_epochs batch_size lr min_lr weight_decay clip_grad seed",
    "Regularization": "rand_augment mixup cutmix random_erasing label_smoothing layer_decay ema_decay",
    "Protocols": "protocols linear_epochs few_shot eval_image_sizes dense_epochs",
    "Study": "tokenizers grid seeds compare_by equal_compute report_only devices",
    "Hardware": "device precision micro_batch_size compile fsdp memory_gb benchmark",
    "Output": "out license resume figures figures_dir serve checkpoint_interval_min max_rollbacks log_interval probe_every probe_images track",
}
"""Heading -> its options, in the order of `--help`; the same for every command, since an option has one meaning everywhere."""
HEADING_BY_OPTION = {name: heading for heading, names in HEADINGS.items() for name in names.split()}
OPTION_ORDER = list(HEADING_BY_OPTION)
BASIC_OPTIONS = """images test_images backbone run tokenizer tokens teacher model image_size patch_size objective target mask_ratio quantizer
vocab_size views protocols labels_per_class tokenizers grid epochs batch_size lr device out resume"""
"""Options in the short `--help` of a command that has more than `MAX_BASIC_OPTIONS`."""
MAX_BASIC_OPTIONS = 15


def main(argv: list[str] | None = None) -> int:
    """Run one command of the command line, and print its error, if any, on one line.

    Args:
        argv: arguments without the program's name; None means those of the process.

    Returns:
        The exit code: 0, that of a `MapetError` (2, or 130 after a signal to stop), 130 for Ctrl-C, 141 for a closed pipe, 2 for an
        error of the operating system. Other exceptions are bugs and leave with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
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
    except MapetError as error:
        if is_first_rank() or not isinstance(error, Interrupted):  # all ranks are interrupted: one of them reports it
            print(f"mapet {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"mapet {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. `| head`; Python would fail again when it flushes stdout at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # disk full, permission denied, ...
        text = f"{error.strerror or error} ({error.filename or 'while writing'}){os_error_hint(error.errno)}"
        print(f"mapet {name}: {text}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """Return the text of `mapet --help`: every command under its heading, with its summary."""
    about = (mapet.__doc__ or "").split("\n")[0].removeprefix("mapet: ")
    lines = ["usage: mapet COMMAND [config.yaml] [--option value ...]", "", about, ""]
    for heading, functions in GROUPS.items():
        lines += [f"{heading}:", *(f"  {command_name(function):<20}{summary(function)}" for function in functions), ""]
    return "\n".join([*lines, EPILOG])


def completion(shell: str) -> str:
    """Return the script that completes commands and options in a shell, e.g. 'bash'.

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
    """Call a command with the arguments after its name, and return its result; with `--help` only print its options.

    Raises:
        MapetError: an unknown command, or arguments that make no config; whatever the command raises.
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
    RESUME_HINT[0] = "the same command, with --resume if it had started" if "resume" in config_type.model_fields else ""
    out = getattr(config, "out", None) if getattr(config, "resume", False) else None
    if path and out and written_by and path.parent.resolve() != out.resolve():
        where = (
            f"{path} is the config of the run in its own folder, but {option('out')} is {out}, seen from {Path.cwd()}"
        )
        moved = f"if it was moved, give {option('out')} {quote(str(path.parent))}"
        raise MapetError(f"{where}: go to the folder that the run was started in, or, {moved}")
    return function(config)


def _parse_arguments(function: AnyCommand, argv: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """Split a command's arguments into the config file, if one is given, and the options.

    The first argument without an option name is the config file if it ends like one, or if the command takes no other such
    argument; the rest are values of the command's positional option.

    Returns:
        The file, and name -> text or texts of each option that was given; those of sections nested in mappings.
    """
    name, config_type = command_name(function), function.config_type
    namespace, unknown = create_parser(function).parse_known_args(argv)
    options = vars(namespace)
    unnamed, positional, path = options.pop("unnamed", []), config_type.positional, None
    several = positional is not None and is_multi_valued(config_type.model_fields[positional].annotation)
    if unnamed and (positional is None or Path(unnamed[0]).suffix in CONFIG_SUFFIXES):
        path = Path(unnamed.pop(0))
    max_unnamed = len(unnamed) if several else int(positional is not None)
    if unknown := [*unknown, *unnamed[max_unnamed:]]:
        raise MapetError(_explain_unknown(name, unknown[0]))
    if unnamed and positional in options:
        raise MapetError(f"'{' '.join(unnamed)}' and {option(positional)} are mutually exclusive: give one of them")
    if unnamed and positional:
        options[positional] = unnamed if several else unnamed[0]
    typed: dict[str, Any] = {}
    for dotted, value in options.items():
        section, _, last = dotted.rpartition(".")
        value = dict(value) if isinstance(value, list) and isinstance(value[0], tuple) else value  # of KEY=VALUE pairs
        (typed.setdefault(section, {}) if section else typed)[last] = value
    if path and path.is_dir():
        raise MapetError(f"{path} is a folder, not a config: {_suggest_option(name, path, 'resume' in typed)}")
    if path and path.suffix.lower() not in CONFIG_SUFFIXES:
        raise MapetError(f"{path} is not a config (.yaml): options are written --name value, see `mapet {name} --help`")
    return path, typed


def _explain_unknown(name: str, argument: str) -> str:
    """Return the error message for an argument that the parser of command `name` does not know."""
    if not argument.startswith("--"):
        return f"unexpected argument '{argument}'; options are written --name value, see `mapet {name} --help`"
    flag, config_type = argument.split("=")[0].replace("_", "-"), COMMANDS[name].config_type
    if (field := flag[2:].replace("-", "_")) in config_type.file_only:
        return f"{flag} is for config files: `mapet {name} config.yaml` with `{field}: ...` in it"
    known = [option(known) for known, _ in iter_options(config_type)]
    return f"unknown option '{flag}'{did_you_mean(flag, known) or '.'} See `mapet {name} --help`"


def _suggest_option(name: str, folder: Path, resume: bool) -> str:
    """Return what the user who gave command `name` a folder instead of a config probably meant.

    It is the config in that folder, if the command wrote it, else the option whose value the folder probably is: a tokenizer, the
    `out` of a run to resume, a run, or images.
    """
    if config := find_config(folder, (name,)):
        return f"did you mean {config[1]}?"
    is_tokenizer = (folder / "visual_tokenizer.json").is_file()
    likely = ["out"] if resume else ["tokenizer"] if is_tokenizer else ["run", "backbone", "bundle"]
    known = COMMANDS[name].config_type.model_fields
    first = next(name for name in [*likely, "images", "out"] if name in known)
    return f"give it as {option(first)} {quote(str(folder))}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise MapetError(f"{message}. See `{self.prog} --help`")


def create_parser(function: AnyCommand, hide: bool = False) -> argparse.ArgumentParser:
    """Create the parser of a command, with an option for each field of its config and its sections, under headings.

    Args:
        hide: omit from the help the options of sections and, where a command has many, those that are not in `BASIC_OPTIONS`.
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
    own = {dotted: field for dotted, field in iter_options(config_type) if "." not in dotted}
    basic = own if len(own) <= MAX_BASIC_OPTIONS else BASIC_OPTIONS.split()
    groups: dict[str, Any] = {}
    options = [(*dotted.rpartition(".")[::2], dotted, field) for dotted, field in iter_options(config_type)]
    for section, last, dotted, field in sorted(options, key=lambda item: (item[0], OPTION_ORDER.index(item[1]))):
        heading = f"Options of {section.replace('_', '-')}" if section else HEADING_BY_OPTION[last]
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        shown = not hide or (dotted in own and (dotted in basic or field.is_required()))
        flag, help_text = f"--{dotted.replace('_', '-')}", _help(field) if shown else argparse.SUPPRESS
        groups[heading].add_argument(flag, dest=dotted, help=help_text, **_arguments(field.annotation))
    help_group = parser.add_argument_group("Help")
    help_group.add_argument("-h", "--help", action="help", help="the usual options")
    help_group.add_argument("--help-all", action="help", help="all options, those of sections included")
    return parser


def _help(field: FieldInfo) -> str:
    """Return an option's help text: its description, and its default or that it is required."""
    description = " ".join((field.description or "").split()).replace("%", "%%")  # argparse formats help texts by %
    if field.is_required():
        return f"{description} (required)"
    default = field.get_default(call_default_factory=True)
    text = format_none(field) if default is None else str(default)
    if isinstance(default, (tuple, list, dict)):
        text = " ".join(map(str, default))
    return f"{description} (default: {text.lower() if isinstance(default, bool) else text})" if text else description


def _key_value(argument: str) -> tuple[str, Any]:
    """Parse KEY=VALUE, whose value is YAML, or plain text where it is no valid YAML.

    Raises:
        ArgumentTypeError: no '=', or '{a:1}', which YAML reads as the key 'a:1' without a value.
    """
    key, equals, text = argument.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes key=value pairs, got {argument}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return key, text
    if isinstance(value, dict) and any(inner is None and ":" in str(name) for name, inner in value.items()):
        raise argparse.ArgumentTypeError(f"'{argument}': YAML wants a space after each colon")
    return key, value


def _arguments(annotation: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for an option of this type; values stay text, which pydantic converts."""
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Literal:
        return {"choices": [str(part) for part in parts], "metavar": "{" + ",".join(map(str, parts)) + "}"}
    if origin is dict:
        return {"metavar": "KEY=VALUE", "nargs": "+", "type": _key_value}
    if origin in (tuple, list):
        return _arguments(parts[0]) | {"nargs": "+"}
    if bool in (annotation, *parts):
        return {"action": argparse.BooleanOptionalAction}
    if parts:  # Annotated, or alternatives, of which the first is shown
        return _arguments(parts[0])
    return {"metavar": {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}.get(annotation, "VALUE")}
