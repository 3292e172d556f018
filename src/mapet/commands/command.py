"""Commands: functions that are called with their config, or with its fields as keywords."""

import functools
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from mapet.config.base import Config, build_config
from mapet.config.limits import LimitOptions, limits, use_limits
from mapet.config.shared import trust_teachers
from mapet.errors import MapetError, option
from mapet.files import check_output_path
from mapet.run_state import is_first_rank, run_state

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
TORCHRUN_VARIABLES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
]
"""Environment variables by which `torchrun` tells a process its rank and where the others are."""


class Command(Protocol[P, R_co]):
    """A command as Python calls it: with the config's fields as keywords, or with the config."""

    __name__: str
    config_type: type[Config]

    @overload
    def __call__(self, config: Config, /) -> R_co: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


AnyCommand = Command[..., Any]


def command_name(function: Callable[..., Any] | AnyCommand) -> str:
    """Return the name of a command on the command line: 'fit-tokenizer' for the function `fit_tokenizer`."""
    return function.__name__.replace("_", "-")


def summary(function: AnyCommand) -> str:
    """Return the first line of a command's docstring."""
    return (inspect.getdoc(function) or "").split("\n")[0]


def command(
    config_type: Callable[P, C], distributed: bool = False, writes_out: bool = True
) -> Callable[[Callable[[C], R]], Command[P, R]]:
    """Return a decorator that turns a function of one config into a command, which also takes the config's fields as keywords.

    Around each call the command validates keywords into a config, refuses an `out` folder inside `images`, sets up logging, and,
    where `out` is a folder, keeps a run.json there (`run_state`, which refuses a folder that is in use and not to be resumed).

    Args:
        config_type: the config class; its fields become the keywords that mypy, `help()` and IDEs show.
        distributed: whether all ranks of `torchrun` run the function, in a process group. If not, rank 0 runs it alone, without
            a process group, and the other ranks return None.
        writes_out: whether the command writes to `out`, if its config has that; if not, there is no run.json.

    Returns:
        The decorator. The command has the attributes `__name__`, `__doc__`, `config_type` and a `__signature__` of keywords. It is
        called as `pretrain(config)`, `pretrain(images=..., out=...)` or, if its config has a `positional` option,
        `evaluate("runs/photos", images=...)`.

    >>> pretrain(images="photos", tokenizer="runs/tokenizer", out="run")      # doctest: +SKIP
    """
    kind = cast(type[Config], config_type)

    def decorate(function: Callable[[C], R]) -> Command[P, R]:
        """Return the command of a function that takes one config.

        Args:
            function: of one config; its docstring becomes that of the command.

        Returns:
            The command.
        """
        signature = _signature(kind, inspect.signature(function).return_annotation)

        @functools.wraps(function)
        def call(config: object = None, /, **options: Any) -> R | None:
            """Call the command.

            Args:
                config: the config; or the value of the command's `positional` option; None: all options are keywords.
                options: fields of the config.

            Returns:
                What the command returns; None on ranks that do not run it.

            Raises:
                TypeError: a config together with keywords, or a value of a command without a `positional` option.
            """
            if isinstance(config, kind) and options:
                raise TypeError(f"{function.__name__}() takes a config or keywords, not both")
            if not isinstance(config, kind):
                if config is not None:  # the value of the one option that needs no name
                    if kind.positional is None:
                        example = f"{function.__name__}({next(iter(signature.parameters))}={config!r}, ...)"
                        raise TypeError(f"{function.__name__}() takes keywords: {example}")
                    if kind.positional in options:
                        raise TypeError(f"{function.__name__}() got multiple values for argument '{kind.positional}'")
                    options[kind.positional] = config
                config = build_config(kind, options)
            if writes_out:
                _check_out_is_not_inside_images(config)
            _set_up_logging()
            in_force = limits()  # of an outer command, or the defaults
            if isinstance(config, LimitOptions) and "limits" in config.model_fields_set:
                in_force = config.limits
            with trust_teachers(options), use_limits(in_force), _translate_dead_workers():
                return _run(function, config, distributed, writes_out)

        call.__dict__.update(config_type=kind, __signature__=signature)
        return cast(Command[P, R], call)

    return decorate


def _run(function: Callable[[Any], R], config: Config, distributed: bool, writes_out: bool) -> R | None:
    """Call a command's function, and keep run.json (status, duration, versions) in the config's `out` folder, if it has one.

    Without `torchrun` the function is called in this process. Under `torchrun` it is called on every rank, in a process group that
    ends with the call, if `distributed` is true; else on rank 0 alone.

    Args:
        function: of the command.
        config: its argument.
        distributed, writes_out: of the command, see `command`.

    Returns:
        The function's result; None on ranks that did not call it.

    Raises:
        MapetError: `out` is a file that exists and is not to be resumed, or see `run_state`; and what the function raises.
    """
    out = getattr(config, "out", None) if writes_out else None
    if out is not None and config.out_is_file and is_first_rank():
        check_output_path(out)
        if out.exists() and not getattr(config, "resume", False):
            message = (
                f"{option('out')} {out} already exists, and nothing is overwritten: choose another {option('out')}"
            )
            raise MapetError(message, field="out", value=out)
    state = nullcontext() if out is None or config.out_is_file else run_state(out, command_name(function), config)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        with state:
            return function(config)
    if not distributed:
        return _run_on_rank_0(function, config, state)
    from mapet.distributed import barrier, process_group  # imports torch, which --help can do without

    with state, process_group():
        result = function(config)
        barrier()
        return result


def _run_on_rank_0(function: Callable[[Any], R], config: Config, state: AbstractContextManager[None]) -> R | None:
    """Call a function on rank 0 of `torchrun` as if it were the only process, and return its result; on other ranks return None.

    The variables of `torchrun` are removed from the environment meanwhile. If a distributed command called this one, so that a process group
    exists, all ranks wait until rank 0 is done.

    Args:
        function: a command; whatever it raises on rank 0 is raised here, and the other ranks then fail at their next collective.
        config: the function's argument.
        state: context of `run_state`, entered on rank 0 only; it keeps run.json.

    Returns:
        The function's result on rank 0, None on the others.

    Raises:
        MapetError: the config has `serve=True`: rank 0 would serve the page until Ctrl-C while the other ranks wait.
    """
    if getattr(config, "serve", False):
        hint = f"{option('serve', True)} runs in one process: start it without torchrun"
        raise MapetError(hint, field="serve", value=True)
    distributed = sys.modules.get("mapet.distributed")  # None: not imported, so there is no process group
    result = None
    if is_first_rank():
        variables = {name: os.environ.pop(name) for name in TORCHRUN_VARIABLES if name in os.environ}
        try:
            with state, distributed.disable_collectives() if distributed else nullcontext():
                result = function(config)
        finally:
            os.environ.update(variables)
    if distributed is not None:
        distributed.barrier()  # returns at once without a process group
    return result


def _signature(config_type: type[Config], returns: object) -> inspect.Signature:
    """Return the signature of a command: the config's fields as keywords, required ones first, with their types and defaults.

    Types are shown without pydantic's validators, e.g. `int` for `Annotated[int, Field(ge=2)]`.

    Args:
        returns: the annotation of what the command returns.
    """
    types, parameters = typing.get_type_hints(config_type), inspect.signature(config_type).parameters.values()
    keywords = [parameter.replace(annotation=types[parameter.name]) for parameter in parameters]
    keywords.sort(key=lambda keyword: keyword.default is not keyword.empty)
    return inspect.Signature(keywords, return_annotation=returns)


def _check_out_is_not_inside_images(config: Config) -> None:
    """Raise MapetError if `out` is `images` or lies in it: files written there would later be listed as images."""
    images, out = getattr(config, "images", None), getattr(config, "out", None)
    if images is None or out is None or config.out_is_file:
        return
    folder, target = Path(images).resolve(), Path(out).resolve()
    if folder.is_dir() and folder in (target, *target.parents):
        raise MapetError(
            f"{option('out')} {out} must not be inside {option('images')} {images}, where its files would be listed as images. "
            "Choose a folder outside",
            field="out", value=out,
        )  # fmt: skip


@contextmanager
def _translate_dead_workers() -> Iterator[None]:
    """Turn the RuntimeError that PyTorch raises, wherever the main process is, when a data-loading worker dies into a MapetError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise MapetError(
            f"a data-loading worker died ({str(error).splitlines()[0].rstrip('. ')}). If it was killed, memory may have run out: set the "
            f"environment variable MAPET_WORKERS to fewer workers. What was saved is intact: resume with {option('resume', True)}"
        ) from None


class _ConsoleHandler(logging.Handler):
    """Prints log records to stdout, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record.

        A stdout that takes no more (`| head`, a closed terminal, a full disk) does not end the command: it is silent from then on.
        """
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError:
            silence_stdout()


def silence_stdout() -> None:
    """Let stdout go nowhere, where writing to it has failed; otherwise Python would fail again when it flushes it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _set_up_logging() -> None:
    """Print log records of level INFO and above to stdout, unless the program has set up logging of its own.

    On ranks other than 0 it also turns progress bars off: rank 0 shows one for all.
    """
    if not is_first_rank():
        os.environ["TQDM_DISABLE"] = "1"
    log = logging.getLogger("mapet")
    if not log.handlers and not logging.getLogger().handlers:
        log.addHandler(_ConsoleHandler())
        log.setLevel(logging.INFO)
