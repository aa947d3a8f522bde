"""Compares the tensors of an export with what ``from_pretrained`` of the written config will look for.

``from_pretrained`` fills parameters that it does not find with random numbers and passes over names that it does not
know, with no more than a warning. So a wrong name is an error here, before the folder replaces another.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_pso.errors import UnsupportedError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

log = logging.getLogger(__name__)

_MOST_NAMES = 4  # that an error shows
_REMEDY = "give the model its layers in its own class and config, or take the weights from inside swarm.consensus()"

Shapes = Mapping[str, tuple[int, ...]]


def as_opened(module: nn.Module) -> nn.Module:
    """Return what ``from_pretrained`` of the module's config begins with, on the meta device, with its adapters if any.

    The module itself where that cannot be built: another library's, or one whose class wants more than its config.

    Args:
        module: without wrappers around it or in it.
    """
    base = module.get_base_model() if is_peft(module) else module  # type: ignore[operator]
    if not isinstance(base, PreTrainedModel) or getattr(base, "hf_quantizer", None) is not None:
        return module
    if has_own_adapters(module):
        return module
    try:
        with torch.random.fork_rng(devices=[]):
            with accelerate.init_empty_weights():
                fresh = type(base)(copy.deepcopy(base.config))
            fresh.tie_weights()  # what moved to the meta device one by one is tied no longer
            with accelerate.init_empty_weights():
                return _with_adapters(fresh, module) if is_peft(module) else fresh
    except Exception as error:  # the model's own code, or peft's
        log.warning("the export is not compared with a %s of its config: %s", type(base).__name__, error)
        return module


def saves_itself(module: nn.Module) -> bool:
    """True if the module has a ``save_pretrained`` that writes the tensors it is given, and not its own."""
    return isinstance(module, PreTrainedModel) or is_peft(module)


def is_peft(module: nn.Module) -> bool:
    """True for a model of peft's."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def has_own_adapters(module: nn.Module) -> bool:
    """True for a model of transformers' into which adapters were put by ``add_adapter``: it saves these alone."""
    return bool(getattr(module, "_hf_peft_config_loaded", False)) and not is_peft(module)


def _with_adapters(fresh: PreTrainedModel, like: nn.Module) -> PeftModel:
    import peft

    (first, config), *others = like.peft_config.items()  # type: ignore[union-attr, operator]
    model = peft.get_peft_model(fresh, _trainable(config), adapter_name=first)
    for name, config in others:
        model.add_adapter(name, _trainable(config))
    return model


def _trainable(config: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(config)
    config.inference_mode = False
    if getattr(config, "init_lora_weights", True) not in (True, False):
        config.init_lora_weights = True  # others want to see values
    return config


def check_tensors(tensors: Mapping[str, Tensor], trained: Iterable[str], opened: nn.Module) -> None:
    """Compare names and shapes of a whole model with those of ``opened``, as from ``as_opened``.

    Of a peft model only what was trained: its base is not written.

    Raises:
        UnsupportedError: there is a parameter or persistent buffer more or less, or one of another shape.
    """
    expected = shapes_of(opened)
    if is_peft(opened):
        wanted = {name for name, parameter in opened.named_parameters() if parameter.requires_grad} | set(trained)
        tensors = {name: tensor for name, tensor in tensors.items() if name in wanted}
        expected = {name: shape for name, shape in expected.items() if name in wanted}
    together = {name: names for names in _tied(opened) for name in names}
    unknown = [name for name in tensors if name not in expected]
    missing = [name for name in expected if not any(other in tensors for other in together.get(name, [name]))]
    if unknown or missing:
        raise UnsupportedError(
            f"export: from_pretrained would open another model than was trained: {type(opened).__name__} of the "
            f"config{_listed(' does not know', unknown)}{_listed(' would look in vain for', missing)}; {_REMEDY}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise UnsupportedError(
                f"export: {name} has the shape {list(tensor.shape)}, and {type(opened).__name__} of the config opens "
                f"it as {list(expected[name])}; let the config say how large it is, as resize_token_embeddings does"
            )


def untied(tensors: dict[str, Tensor], tied: Mapping[str, str], opened: nn.Module) -> None:
    """Add copies under names that were tied where the model was trained, and are not in ``opened``.

    Args:
        tied: such a name, and the one under which its tensor is there.
    """
    together = {name: names for names in _tied(opened) for name in names}
    for name, source in tied.items():
        if name not in tensors and source in tensors and source not in together.get(name, ()):
            tensors[name] = tensors[source].clone()


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return the names of shared parameters but the first of each, and that first one."""
    return {name: names[0] for names in _tied(module) for name in names[1:]}


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter, whole, and of each persistent buffer; tied ones under each of their names."""
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                shapes[f"{prefix}.{name}" if prefix else name] = tuple(buffer.shape)
    return shapes


def _tied(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def check_files(
    folder: Path, expected: Shapes, trained: Iterable[str], opened: nn.Module, *, of_module: bool = False
) -> None:
    """Compare the files in ``folder`` with the tensors that were to be in them.

    Args:
        expected: the shapes of the whole model.
        trained: names of the parameters that were trained.
        opened: as from ``as_opened``.
        of_module: whether the module that saved itself holds the values that were to be written.

    Raises:
        UnsupportedError: something is missing, added, or of another shape.
    """
    if is_peft(opened):
        _check_adapters(folder, trained, opened, of_module)
    elif has_own_adapters(opened):
        written = _written(folder, "adapter_model*.safetensors")
        _check_elements(written, expected, sum(math.prod(expected[name]) for name in trained), at_least=True)
    else:
        ignored = set(getattr(opened, "_keys_to_ignore_on_save", None) or ())
        expected = {name: shape for name, shape in expected.items() if name not in ignored}
        written = _written(folder, "model*.safetensors")
        if written != expected:  # transformers may rename, cut or join, by rules that it also reads by
            _check_elements(written, expected, _elements(expected))


def _check_elements(written: Shapes, expected: Shapes, count: int, *, at_least: bool = False) -> None:
    found = _elements(written)
    if not written or found < count or (found > count and not at_least):
        missing = [name for name in expected if name not in written]
        unknown = [name for name in written if name not in expected]
        raise UnsupportedError(
            f"export: {found} elements were written instead of {count}{_listed('; missing', missing)}"
            f"{_listed('; added', unknown)}; {_REMEDY}"
        )


def _check_adapters(folder: Path, trained: Iterable[str], opened: nn.Module, of_module: bool) -> None:
    import peft

    adapters: Mapping[str, PeftConfig] = opened.peft_config  # type: ignore[assignment]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(opened).items()}
    saved: set[str] = set()
    for adapter, config in adapters.items():
        place = folder if adapter == "default" else folder / adapter
        written = _written(place, "adapter_model*.safetensors")
        missing: list[str] = []
        if config.is_prompt_learning:  # peft takes prompts from the module and not from what it is given
            saved |= {name for name in state if "prompt_encoder." in name and of_module}
        else:
            expected = peft.get_peft_model_state_dict(
                opened, state_dict=state, adapter_name=adapter, save_embedding_layers=False
            )
            missing = [name for name in expected if name not in written]
            whole = {id(value) for value in expected.values()}
            saved |= {name for name, value in state.items() if id(value) in whole}
            saved |= {name for name in state if name.replace(f".{adapter}", "") in written}
        if missing or not written:
            raise UnsupportedError(
                f"export: {place / 'adapter_model.safetensors'} would hold {len(written)} tensors"
                f"{_listed('; missing', missing)}; {_REMEDY}"
            )
    lost = [name for name in trained if name not in saved]
    if lost:
        raise UnsupportedError(
            f"export: peft would not save what was trained{_listed(':', sorted(lost))}; name its layers in the "
            "adapter's modules_to_save, or take the weights from the model inside swarm.consensus()"
        )


def _written(folder: Path, pattern: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes in safetensors files; only their headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob(pattern):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _listed(before: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{before} {', '.join(names[:_MOST_NAMES])}{more}"
