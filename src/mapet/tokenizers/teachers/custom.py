"""The user's own encoder, as 'package.module:function'."""

import inspect
import pkgutil
from collections.abc import Callable

from torch import Tensor, nn

from mapet.config.shared import TRUSTED_TEACHERS, Size, is_trusted_teacher
from mapet.errors import MapetError, did_you_mean, first_line, option


def build(teacher: str, checkpoint: str | None, teacher_size: Size | None) -> nn.Module:
    """Import the function that `teacher` names, call it with the checkpoint, and return the encoder that it returns.

    Args:
        teacher: 'package.module:function'. The function takes one argument and returns an `nn.Module` or another callable, which maps
            (B, C, h, w) floats in [0, 1] to (B, F, rows, columns) and may have the attribute `image_size`.
        checkpoint: passed to the function; None: the option was not given.
        teacher_size: not used here; the parameter allows the option, which `Teacher` uses.

    Returns:
        The encoder, as a module.

    Raises:
        MapetError: it is not trusted (see `mapet.config.shared.trust_teachers`), and nothing is imported; there is no such function, it does
            not take one argument, or it returns something that is not callable.
    """
    if not is_trusted_teacher(teacher):
        name = f"{option('teacher')} or {option('trust_teacher')}"
        raise MapetError(
            f"the teacher '{teacher}' is code that a file names: if you trust it, repeat its name as {name}, or set the environment variable "
            f"{TRUSTED_TEACHERS}={teacher}",
            field="teacher",
            value=teacher,
        )
    try:
        function = pkgutil.resolve_name(teacher)
    except ImportError as error:
        hint = "install its package, or add its folder to PYTHONPATH"
        raise MapetError(
            f"teacher '{teacher}': cannot import {teacher.partition(':')[0]} ({first_line(error)}): {hint}"
        ) from None
    except (AttributeError, ValueError) as error:  # ValueError: not of the form package.module:function
        suggestion = did_you_mean(getattr(error, "name", ""), dir(getattr(error, "obj", None))) or "; check its name"
        raise MapetError(f"teacher '{teacher}': {first_line(error)}{suggestion}") from None
    try:
        inspect.signature(function).bind(checkpoint)
    except TypeError:
        raise MapetError(
            f"teacher '{teacher}' must be a function of one argument, the checkpoint path or None, that returns an encoder"
        ) from None
    encoder = function(checkpoint)
    if not callable(encoder):
        problem = f"teacher '{teacher}' must return a callable encoder, got {type(encoder).__name__}"
        raise MapetError(f"{problem}: change what the function returns", field="teacher", value=teacher)
    return encoder if isinstance(encoder, nn.Module) else CallableModule(encoder)


class CallableModule(nn.Module):
    """An `nn.Module` whose forward is a given callable; it takes over its `image_size`, if there is one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """Wrap a function from images (B, C, h, w) in [0, 1] to features (B, F, rows, columns)."""
        super().__init__()
        self.forward, self.image_size = function, getattr(function, "image_size", None)
