"""Looks through modules that wrap another one and put a part of their own into the names of its parameters.

``torch.compile`` names them ``_orig_mod.``, activation checkpointing ``_checkpoint_wrapped_module.``, FSDP
``_fsdp_wrapped_module.``, DataParallel ``module.``. A model that is opened anew has none of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def wraps_as(module: nn.Module) -> str | None:
    """Return the attribute under which this module wraps another; None if it is not a wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return next((name for name in _ATTRIBUTES if name in module._modules), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers around this one; its parts may be wrapped themselves."""
    while (name := wraps_as(module)) is not None:
        module = module.get_submodule(name)
    return module


def has_wrappers(module: nn.Module) -> bool:
    """True if the module, or a part of it, is a wrapper."""
    return any(wraps_as(part) is not None for part in module.modules())


def plain_name(module: nn.Module, name: str) -> str:
    """Return what a parameter or buffer of ``module`` would be called if nothing in it were wrapped.

    Args:
        name: as in ``module.named_parameters()``.
    """
    parts: list[str] = []
    at: nn.Module | None = module
    for part in name.split("."):
        if at is None or part != wraps_as(at):
            parts.append(part)
        at = None if at is None else at._modules.get(part)  # the last part is a tensor
    return ".".join(parts)


def without_wrapper_parts(name: str) -> str:
    """Return a name without what wrappers have put into it, for want of the module; ``module.`` might be the user's."""
    return ".".join(part for part in name.split(".") if part not in _ATTRIBUTES)


@contextlib.contextmanager
def taken_off(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module with no wrapper around it or in it; after the block all are back.

    So that libraries find their own layers under the names that they gave them. Run no forward pass inside.
    """
    root = unwrapped(module)
    wrapped = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if child is not None and wraps_as(child) is not None
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = unwrapped(child)
        yield root
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
