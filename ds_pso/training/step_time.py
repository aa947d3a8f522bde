"""The time of an optimizer step of a model, measured with DeepSpeed on one rank of this machine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import deepspeed
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from ds_pso.errors import ConfigError
from ds_pso.export.meta_model import load_model_config, num_parameters
from ds_pso.training.llama import VOCABULARY
from ds_pso.training.model import TrainingEngine, causal_loss, llama_config
from ds_pso.training.start import settle_on_cpu

_SEQ_LENGTH = 1024  # at most
_WARMUP, _MEASURED = 2, 5  # steps
# What a particle of one rank without a schedule does not need, and what depends on the number of ranks.
_LEFT_OUT = ("swarm", "scheduler", "train_batch_size", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu")


@dataclass(frozen=True)
class StepTime:
    """A measured step.

    Attributes:
        seconds: median of the steps.
        parameters: number of parameters of the model.
        backend: of DeepSpeed's collectives on this machine, ``nccl`` or ``gloo``.
        device: name of the device.
    """

    seconds: float
    parameters: int
    backend: str
    device: str


def measure_step(model: str, ds_config: Mapping[str, object], tokens: int) -> StepTime:
    """Train a model with random weights on random tokens for a few steps, and measure them.

    Args:
        model: ``llama:<layers>x<width>``, a local folder, or a hub id; only its config is read.
        ds_config: DeepSpeed's part of the config: precision, ZeRO stage, optimizer, and the micro batch if it is a
            number.
        tokens: tokens of a step on this rank.

    Raises:
        ConfigError: the model is none, or takes more memory than there is.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        settle_on_cpu()
    built = _build(model)
    given = ds_config.get("train_micro_batch_size_per_gpu")
    longest = getattr(built.config, "max_position_embeddings", _SEQ_LENGTH)
    rows, length, micro_batches = shape_of_step(tokens, given if isinstance(given, int) else 1, longest)
    config = {key: value for key, value in _without_auto(ds_config).items() if key not in _LEFT_OUT}
    config |= {"train_micro_batch_size_per_gpu": rows, "gradient_accumulation_steps": micro_batches}
    config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    _be_alone()
    parameters = num_parameters(built)
    try:
        engine, *_ = deepspeed.initialize(model=built, model_parameters=built.parameters(), config=config)
        seconds = _time(_step(engine, built.config.vocab_size, (rows, length), micro_batches))
        engine.destroy()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--measure: {model} and a step of {tokens} tokens take more memory than one device has; lower --tokens, "
            "or give --gpus"
        ) from error
    finally:
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, threads: {torch.get_num_threads()}"
    return StepTime(
        seconds * tokens / (rows * length * micro_batches), parameters, "nccl" if on_gpu else "gloo", device
    )


def shape_of_step(tokens: int, micro_batch: int, longest: int) -> tuple[int, int, int]:
    """Return sequences of a micro batch, tokens of each, and micro batches of a step; about ``tokens`` in all."""
    rows = min(micro_batch, tokens)
    length = min(_SEQ_LENGTH, longest, tokens // rows)
    return rows, length, max(1, round(tokens / (rows * length)))


def _build(model: str) -> PreTrainedModel:
    if model.startswith("llama:"):
        return LlamaForCausalLM(llama_config(model, VOCABULARY))
    try:
        built: PreTrainedModel = AutoModelForCausalLM.from_config(load_model_config(model))
    except ValueError as error:
        raise ConfigError(
            f"--measure: {model} is no causal language model; give --gpus or --step-seconds instead"
        ) from error
    return built


def _step(engine: TrainingEngine, vocabulary: int, shape: tuple[int, int], micro_batches: int) -> Callable[[], None]:
    batch = torch.randint(vocabulary, shape, device=engine.device)

    def step() -> None:
        for _ in range(micro_batches):
            engine.backward(causal_loss(engine, batch))
            engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _time(step: Callable[[], None]) -> float:
    """Return the median seconds of a call, after a few that do not count."""
    seconds = []
    for _ in range(_WARMUP + _MEASURED):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return median(seconds[_WARMUP:])


def _without_auto(section: Mapping[str, object]) -> dict[str, object]:
    """Return a config without the keys that a Trainer would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _be_alone() -> None:
    """Make this process a world of one, as DeepSpeed finds it in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
