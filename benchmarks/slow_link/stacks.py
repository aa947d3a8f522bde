"""The same training in each of the stacks that are compared: Llama, AdamW, one rank at each end of the link."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.slow_link.runs import MICRO_BATCH, SEQ_LENGTH, Run

Syncs = Callable[[], int]

LR = 1e-3
VOCABULARY = 8192


def build_model(width: int = 256) -> nn.Module:
    """A Llama, the same one everywhere; of 7.4 million parameters unless it is wider."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches(rank: int) -> Iterator[Tensor]:
    """Token ids (MICRO_BATCH, SEQ_LENGTH). Speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        yield torch.randint(VOCABULARY, (MICRO_BATCH, SEQ_LENGTH), generator=generator)


@contextlib.contextmanager
def stack_of(run: Run) -> Iterator[tuple[Callable[[Tensor], None], Syncs]]:
    """What makes one optimizer step on a batch, and what counts sync points, in ds_pso only."""
    with contextlib.ExitStack() as opened:
        if run.stack == "ds_pso":
            swarm = opened.enter_context(_ds_pso(run))
            yield _engine_step(swarm.engine), lambda: swarm.totals.count
        else:
            yield opened.enter_context(_STACKS[run.stack](run)), lambda: 0


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _engine_step(engine: Any) -> Callable[[Tensor], None]:
    def step(ids: Tensor) -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return step


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
    }


def initialize(config: dict[str, Any], model: nn.Module) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled first
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


@contextlib.contextmanager
def _deepspeed(run: Run) -> Iterator[Callable[[Tensor], None]]:
    """ZeRO over the link; alone: a world of one at each end."""
    if not run.talks:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    yield _engine_step(initialize(deepspeed_config(run.stage), build_model()))


_SCHEDULES: dict[str, dict[str, Any]] = {"adaptive": {"compute_share": 0.95}, "wall_time": {"seconds": 5}}


@contextlib.contextmanager
def _ds_pso(run: Run) -> Iterator[Any]:
    import ds_pso

    section = {"particles": 2, "sync_mode": run.rule, "sync_interval": run.interval, "wire": run.wire}
    section |= {"delay": run.delay, "timeout_s": 300, "peer_backend": "gloo"}
    if run.fragments > 1:
        section |= {"fragments": run.fragments, "streaming": True}
    if run.schedule != "fixed":
        section["schedule"] = {"type": run.schedule, "min_interval": run.delay} | _SCHEDULES[run.schedule]
    if not run.talks:
        section |= {"sync_interval": 10**6, "delay": 0}
    with ds_pso.init(deepspeed_config(run.stage) | {"swarm": section}) as swarm:
        swarm.attach(initialize(swarm.ds_config, build_model()))
        yield swarm


@contextlib.contextmanager
def torchft(run: Run, model: nn.Module | None = None) -> Iterator[Callable[[Tensor], None]]:
    """As in torchft's own examples: a replica group of one rank at each end, a lighthouse at the first."""
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo, LocalSGD

    rank, address = int(os.environ["RANK"]), os.environ["ADDRESS"]
    lighthouse = LighthouseServer(bind="[::]:29600", min_replicas=2) if rank == 0 else None
    store = dist.TCPStore(address, 29700 + rank, is_master=True, wait_for_workers=False)
    model = model or build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=300)),
        min_replica_size=2,
        load_state_dict=lambda state: None,
        state_dict=lambda: {},
        use_async_quorum=False,
        init_sync=False,  # both ends begin with the same weights
        timeout=timedelta(seconds=300),
        quorum_timeout=timedelta(seconds=300),
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:29600",
        replica_id=f"end_{rank}",
        hostname=address,
    )
    interval = run.interval if run.talks else 10**6
    if run.rule == "local_sgd":
        algorithm = LocalSGD(manager, model, optimizer, sync_every=interval)
    else:
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        algorithm = DiLoCo(
            manager, [model], optimizer, outer, sync_every=interval, pin_memory=False, fragment_sync_delay=run.delay
        )
    with algorithm:
        yield _plain(model, optimizer)
    manager.shutdown(wait=False)
    del lighthouse


@contextlib.contextmanager
def _accelerate(run: Run) -> Iterator[Callable[[Tensor], None]]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    model = build_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR))
    steps = run.interval if run.talks else 10**6
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=steps, enabled=True) as local_sgd:

        def step(ids: Tensor) -> None:
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()

        yield step
        local_sgd.enabled = False  # what follows the last step is not measured


_STACKS = {"DeepSpeed": _deepspeed, "torchft": torchft, "Accelerate": _accelerate}
