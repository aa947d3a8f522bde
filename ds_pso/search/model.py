"""The model that is scored: one module in memory, whose weights are composed in place from the experts' files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ds_pso.errors import ConfigError, UnsupportedError
from ds_pso.search.experts import Expert, check_shapes
from ds_pso.search.space import Coefficients, Space
from ds_pso.utils.model_folder import replacing_model

_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*", "preprocessor_config.json")


class ComposedModel:
    """A module with the weights that coefficients stand for. Beside it, a tensor in fp32 and one of an expert.

    Args:
        experts: whole models, or adapters.
        base: of whole models, if there is one.
        device: where the module lies, and where tensors are added.

    Raises:
        ConfigError: the module cannot be built.
        UnsupportedError: its tensors have other names in memory than on disk.
    """

    def __init__(self, experts: Sequence[Expert], base: Expert | None, device: torch.device) -> None:
        self._sources = [*experts, *filter(None, [base])]
        transformers_logging.disable_progress_bar()
        first = experts[0]
        self.module = (_load_adapter(first) if first.is_adapter else _load_whole(first.folder)).to(device).eval()
        self._targets = _tensors_on_disk(self.module, first)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are searched, by their name in the files, in the order of the module."""
        return {name: tuple(t.shape) for name, t in self._targets.items() if t.is_floating_point()}

    @torch.no_grad()
    def compose(self, space: Space, c: Coefficients) -> None:
        """Give the module the weights w of ``space.weights(c)``: sum_k w[k, b] expert_k, added in fp32.

        What is no floating-point number is that of the first expert. An expert whose weight is 0 is not read.
        """
        weights = space.weights(c)
        for column, names in zip(weights.T, space.blocks.values(), strict=True):
            for name in names:
                self._targets[name].copy_(self._combine(name, column.tolist(), self._targets[name].device))
        self.module.eval()

    def _combine(self, name: str, weights: Sequence[float], device: torch.device) -> Tensor:
        (weight, source), *others = [pair for pair in zip(weights, self._sources, strict=True) if pair[0] != 0.0]
        total = source.tensor(name).to(device, torch.float32) * weight  # a new tensor: that of the file stays as it is
        for weight, source in others:
            total.add_(source.tensor(name).to(device, torch.float32), alpha=weight)
        return total

    def save(self, folder: Path) -> None:
        """Replace the model in ``folder`` by this one, with the tokenizer of the first expert; other files stay."""
        first = self._sources[0]
        with replacing_model(folder) as temporary:
            self.module.save_pretrained(temporary)  # type: ignore[operator]
            for pattern in _TOKENIZER_FILES:
                for path in first.folder.glob(pattern):
                    if not (temporary / path.name).exists():
                        shutil.copy(path, temporary)
            written = Expert.open(temporary)
            check_shapes(first.shapes, written.shapes, str(first.folder), str(folder))


def _load_whole(folder: str | Path) -> nn.Module:
    """Load a model of transformers', in its own dtype. No code of a model is run, and no pickle is read."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        name = (config.architectures or ["none"])[0]
        kind = getattr(transformers, name, None)
        from_pretrained: Callable[..., nn.Module] | None = getattr(kind, "from_pretrained", None)
        if from_pretrained is None:
            raise ConfigError(
                f"{folder}: its class is {name}, which transformers does not have; give models of transformers'"
            )
        return from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{folder}: transformers cannot open it ({reason}); give models of transformers'") from error


def _load_adapter(expert: Expert) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f'{expert.folder}: is an adapter; pip install "ds_pso[recipes]" for peft') from error
    base = expert.config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{expert.folder}: adapter_config.json names no base model; set base_model_name_or_path")
    return peft.PeftModel.from_pretrained(_load_whole(base), expert.folder)


def _tensors_on_disk(module: nn.Module, expert: Expert) -> dict[str, Tensor]:
    """Return the live tensors that the files hold, by their names there, in the order of the module."""
    if expert.is_adapter:
        import peft

        state: Mapping[str, Tensor] = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
    else:
        state = module.state_dict()
    live = {tensor.data_ptr() for tensor in module.state_dict().values()}
    found = {name: tensor for name, tensor in state.items() if name in expert.shapes and tensor.data_ptr() in live}
    covered = {tensor.data_ptr() for tensor in found.values()}  # tied ones are in the files once
    absent = [name for name in expert.shapes if name not in found or tuple(found[name].shape) != expert.shapes[name]]
    absent += [name for name, tensor in state.items() if tensor.data_ptr() not in covered]
    if absent:
        raise UnsupportedError(
            f"{expert.folder}: {absent[0]} is not the same in the files and in memory ({type(module).__name__}), so it "
            "cannot be composed in place; give models that transformers opens without renaming, and no prompt tuning"
        )
    return found
