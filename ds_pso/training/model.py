"""Builds or loads the causal language model, and evaluates it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from ds_pso.errors import ConfigError
from ds_pso.swarm import Swarm
from ds_pso.training.llama import llama_sizes
from ds_pso.training.text import Blocks

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

_OR_BUILT = "llama:<layers>x<width>, "

Loaded = TypeVar("Loaded", covariant=True)


class Output(Protocol):
    """A batch's output, from a model of ``transformers``; its loss is the mean over the tokens."""

    loss: Tensor


class CausalModel(Protocol):
    """A causal language model of ``transformers``, or the DeepSpeed engine around one."""

    def __call__(self, *, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Output: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...


class TrainingEngine(CausalModel, Protocol):
    """A DeepSpeed engine, as far as a training loop uses it."""

    module: torch.nn.Module
    device: torch.device
    global_steps: int

    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...


class AutoClass(Protocol[Loaded]):
    """A class of ``transformers`` that loads what a folder or a hub id names."""

    def from_pretrained(self, name: str, **options: object) -> Loaded: ...


def load_tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer that comes with a local or hub model; None for one built from scratch."""
    if model.startswith("llama:"):
        return None
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, model, _OR_BUILT)


def build_model(
    model: str, tokenizer: PreTrainedTokenizerBase, seq_length: int, ds_config: dict[str, object]
) -> torch.nn.Module:
    """Build a Llama of the size that ``model`` names, or load the pretrained model it points to."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if not model.startswith("llama:"):
        with _partitioned_loading(ds_config):
            return from_pretrained(AutoModelForCausalLM, model, _OR_BUILT)
    return LlamaForCausalLM(llama_config(model, len(tokenizer), seq_length, tokenizer.eos_token_id))


def llama_config(model: str, vocabulary: int, seq_length: int = 0, end_of_text: int | None = None) -> LlamaConfig:
    """Return the ``transformers`` config of ``llama:<layers>x<width>``."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **llama_sizes(model, vocabulary),
        max_position_embeddings=max(2048, seq_length),
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def from_pretrained(kind: AutoClass[Loaded], model: str, or_else: str = "", **options: object) -> Loaded:
    """``kind.from_pretrained(model)``; ConfigError if that fails, which also names what may be given ``or_else``."""
    try:
        return kind.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model {model}: cannot be loaded ({reason}); give {or_else}a local folder or a hub id"
        ) from error


class _partitioned_loading:
    """Under ZeRO 3, load each weight straight into its partitions instead of whole on every rank."""

    def __init__(self, ds_config: dict[str, object]) -> None:
        self._config = ds_config
        self._handle: object = None

    def __enter__(self) -> None:
        zero = self._config.get("zero_optimization")
        if isinstance(zero, dict) and zero.get("stage") == 3:
            import deepspeed
            from transformers.integrations import HfDeepSpeedConfig

            deepspeed.init_distributed()
            self._handle = HfDeepSpeedConfig(self._config)  # transformers looks for a living one

    def __exit__(self, *_: object) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        if self._handle is not None:
            unset_hf_deepspeed_config()


def causal_loss(model: CausalModel, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; ``batch`` has shape (batch, seq_length)."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


class HeldOut:
    """Held-out loss of a particle, each rank scoring its share of the same blocks.

    The first blocks make the probe batches, the others the evaluation, so that choosing particles or
    steps by the probe does not look at what is reported.
    """

    def __init__(self, swarm: Swarm, blocks: Blocks, batch_size: int, device: torch.device, num_batches: int = 4):
        self._parts = swarm.world.layout.particle_size // swarm.ranks_per_sample
        one = batch_size * self._parts
        probe = range(min(one * num_batches, max(1, len(blocks) // 4)))
        wanted = one * num_batches
        evaluation = range(len(probe), min(len(probe) + wanted, len(blocks))) or probe  # a single block serves both
        self._swarm, self._blocks, self._batch_size, self._device = swarm, blocks, batch_size, device
        self._everything = list(evaluation)
        # Ranks go in step under ZeRO 3, so each must run as many batches; a short set is used whole by all.
        self._evaluation = self._share(evaluation)
        whole = range(0, max(len(probe) - one, 0) + 1, one)
        self._probes = [self._share(probe[start : start + one]) for start in whole]

    def _share(self, indices: range) -> list[int]:
        part = self._swarm.world.layout.shard_rank // self._swarm.ranks_per_sample
        each = len(indices) // self._parts
        return list(indices[part :: self._parts][:each]) if each else list(indices)

    @torch.no_grad()
    def _loss(self, model: CausalModel, indices: list[int]) -> float:
        model.eval()
        total = 0.0
        for start in range(0, len(indices), self._batch_size):
            batch = torch.stack([self._blocks[i] for i in indices[start : start + self._batch_size]])
            total += float(causal_loss(model, batch.to(self._device))) * len(batch)
        model.train()
        return total / len(indices)

    def probe(self, engine: CausalModel) -> Callable[[int], float]:
        """Return a function for ``swarm.attach``: this rank's loss on a probe batch, another at each sync point."""
        return lambda index: self._loss(engine, self._probes[index % len(self._probes)])

    def evaluate(self, engine: CausalModel) -> list[float]:
        """Return the loss of every particle, shape (P,), on every rank."""
        return self._swarm.gather(self._loss(engine, self._evaluation))

    def evaluate_whole(self, model: CausalModel) -> float:
        """Return the loss of an exported model, on one rank alone, on all the blocks of the evaluation."""
        return self._loss(model, self._everything)
