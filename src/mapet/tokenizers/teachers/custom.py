"""The user's own encoder, as 'package.module:function'."""

import importlib
import inspect
from typing import Any

from torch import nn

from mapet.errors import MapetError, did_you_mean


def build(teacher: str, checkpoint: str | None, teacher_size: tuple[int, int] | None) -> nn.Module:
    """Import the function and call it with the checkpoint; it returns an encoder, a module or any callable.

    Raises:
        MapetError: no such function, or not one of one argument, or it returns something else.
    """
    module_name, _, function_name = teacher.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MapetError(
            f"teacher '{teacher}': cannot import {module_name} ({error}); is it installed or on PYTHONPATH?"
        ) from None
    function = getattr(module, function_name, None)
    if function is None:
        near = did_you_mean(function_name, vars(module))
        raise MapetError(f"teacher '{teacher}': {module_name} has no '{function_name}'{near}")
    try:
        inspect.signature(function).bind(checkpoint)
    except TypeError:
        raise MapetError(
            f"teacher '{teacher}' must be a function of one argument, the checkpoint path or None, that returns an encoder"
        ) from None
    encoder = function(checkpoint)
    if not callable(encoder):
        raise MapetError(f"teacher '{teacher}' must return a callable encoder, got {type(encoder).__name__}")
    return encoder if isinstance(encoder, nn.Module) else CallableModule(encoder)


class CallableModule(nn.Module):
    """A callable as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward, self.image_size = function, getattr(function, "image_size", None)
