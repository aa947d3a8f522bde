"""The same training in each of the stacks that are compared: Llama, AdamW, one rank at each end of the link."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.slow_link.runs import MICRO_BATCH, SEQ_LENGTH, Run

LR = 1e-3
VOCABULARY = 8192
POWERSGD_RANK = 4
_LIGHTHOUSE, _STORES = 100, 200  # ports of torchft, counted from MASTER_PORT


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


@dataclass(frozen=True)
class Job:
    """What is trained, the same in every stack.

    Attributes:
        optimizer: DeepSpeed's section; plain torch takes the parameters of its AdamW from it.
        gradient_clipping: norm; 0: none.
        micro_batch: sequences of a step.
        swarm: more keys of ds_pso's section.
        uncompressed_steps: after which PowerSGD begins; DDP needs two.
    """

    build: Callable[[], nn.Module] = build_model
    optimizer: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}}
    )
    gradient_clipping: float = 0.0
    micro_batch: int = MICRO_BATCH
    swarm: Mapping[str, Any] = field(default_factory=dict)
    uncompressed_steps: int = 2


@dataclass(frozen=True)
class Stack:
    """A stack that is ready to train.

    Attributes:
        step: trains on the token ids of a micro-batch and returns its loss, a scalar without a graph.
        module: the model; its parameters are this end's whole weights.
        param_groups: of the optimizer; the next step takes its learning rates from there.
        syncs: counts sync points, in ds_pso only.
    """

    step: Callable[[Tensor], Tensor]
    module: nn.Module
    param_groups: list[dict[str, Any]]
    syncs: Callable[[], int] = lambda: 0


def batches(rank: int) -> Iterator[Tensor]:
    """Token ids (MICRO_BATCH, SEQ_LENGTH), independent, the r-th as frequent as 1 / r: there is something to learn."""
    generator = torch.Generator().manual_seed(rank)
    frequency = 1 / torch.arange(1, VOCABULARY + 1)
    while True:
        ids = torch.multinomial(frequency, MICRO_BATCH * SEQ_LENGTH, replacement=True, generator=generator)
        yield ids.view(MICRO_BATCH, SEQ_LENGTH)


@contextlib.contextmanager
def stack_of(run: Run, job: Job | None = None) -> Iterator[Stack]:
    """The stack of a run. The first end of the link is rank 0."""
    with _STACKS[run.stack](run, job or Job()) as stack:
        yield stack


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, clipping: float) -> Callable[[Tensor], Tensor]:
    def step(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _adamw(job: Job, model: nn.Module) -> torch.optim.AdamW:
    options = {key: value for key, value in job.optimizer["params"].items() if key != "torch_adam"}
    return torch.optim.AdamW(model.parameters(), **options)


def _engine_stack(engine: Any) -> Stack:
    def step(ids: Tensor) -> Tensor:
        loss: Tensor = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Stack(step, engine.module, engine.optimizer.param_groups)


def deepspeed_config(stage: int, job: Job | None = None) -> dict[str, Any]:
    job = job or Job()
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "optimizer": dict(job.optimizer),
        "gradient_clipping": job.gradient_clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def initialize(config: dict[str, Any], model: nn.Module) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would be compiled first
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _be_a_world_of_one() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")


@contextlib.contextmanager
def _torch(run: Run, job: Job) -> Iterator[Stack]:
    """Plain torch on one machine."""
    if run.talks:
        raise ValueError(f"{run}: plain torch does not talk; use DDP")
    model = job.build()
    optimizer = _adamw(job, model)
    yield Stack(_plain(model, optimizer, job.gradient_clipping), model, optimizer.param_groups)


@contextlib.contextmanager
def _deepspeed(run: Run, job: Job) -> Iterator[Stack]:
    """ZeRO over the link; alone: a world of one at each end."""
    if not run.talks:
        _be_a_world_of_one()
    config = deepspeed_config(run.stage, job) | {"gradient_accumulation_steps": run.accumulation}
    if run.wire != "fp32":
        config["communication_data_type"] = run.wire
    yield _engine_stack(initialize(config, job.build()))


@contextlib.contextmanager
def _ddp(run: Run, job: Job) -> Iterator[Stack]:
    """Plain torch, with the communication hooks that gloo can carry; that of bf16 needs NCCL."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    if not run.talks:
        _be_a_world_of_one()
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    module = job.build()
    # PowerSGD starts collectives from the callbacks of others. With several buckets gloo, unlike NCCL, has them in
    # another order at each end ("Received data size doesn't match expected size"), so all gradients are in one.
    one_bucket_mb = 1 + sum(p.numel() for p in module.parameters()) * 4 // 2**20
    model = DistributedDataParallel(module, bucket_cap_mb=one_bucket_mb if run.wire == "PowerSGD" else None)
    if run.wire == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif run.wire == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=POWERSGD_RANK,
            start_powerSGD_iter=job.uncompressed_steps,
            use_error_feedback=True,
            warm_start=True,
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = _adamw(job, module)
    yield Stack(_plain(model, optimizer, job.gradient_clipping), module, optimizer.param_groups)


_SCHEDULES: dict[str, dict[str, Any]] = {"adaptive": {"compute_share": 0.95}, "wall_time": {"seconds": 5}}


@contextlib.contextmanager
def _ds_pso(run: Run, job: Job) -> Iterator[Stack]:
    import ds_pso

    section = {"particles": 2, "sync_mode": run.rule, "sync_interval": run.interval, "wire": run.wire}
    section |= {"delay": run.delay, "timeout_s": 300, "peer_backend": "gloo", **job.swarm}
    if run.fragments > 1:
        section |= {"fragments": run.fragments, "streaming": True}
    if run.schedule != "fixed":
        section["schedule"] = {"type": run.schedule, "min_interval": run.delay} | _SCHEDULES[run.schedule]
    if not run.talks:
        section |= {"sync_interval": 10**6, "delay": 0}
    with ds_pso.init(deepspeed_config(run.stage, job) | {"swarm": section}) as swarm:
        engine = initialize(swarm.ds_config, job.build())
        swarm.attach(engine)
        yield replace(_engine_stack(engine), syncs=lambda: swarm.totals.count)


@contextlib.contextmanager
def torchft(run: Run, job: Job) -> Iterator[Stack]:
    """As in torchft's own examples: a replica group of one rank at each end, a lighthouse at the first."""
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer
    from torchft.local_sgd import DiLoCo, LocalSGD

    rank, address, port = int(os.environ["RANK"]), os.environ["ADDRESS"], int(os.environ["MASTER_PORT"])
    lighthouse = LighthouseServer(bind=f"[::]:{port + _LIGHTHOUSE}", min_replicas=2) if rank == 0 else None
    store = dist.TCPStore(address, port + _STORES + rank, is_master=True, wait_for_workers=False)
    model = job.build()
    optimizer = _adamw(job, model)
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
        lighthouse_addr=f"http://{os.environ['MASTER_ADDR']}:{port + _LIGHTHOUSE}",
        replica_id=f"end_{rank}",
        hostname=address,
    )
    interval = run.interval if run.talks else 10**6
    if run.rule == "local_sgd":
        algorithm = LocalSGD(manager, model, optimizer, sync_every=interval)
    else:
        fragments = fragments_of(model, run.fragments)
        algorithm = DiLoCo(
            manager,
            fragments,
            optimizer,
            [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in fragments],
            sync_every=interval,
            pin_memory=False,
            fragment_sync_delay=run.delay,
            # At 0, the default, the steps taken meanwhile are thrown away. 0.5: Streaming DiLoCo, arXiv 2501.18512.
            fragment_update_alpha=0.5 if run.delay else 0.0,
        )
    with algorithm:
        yield Stack(_plain(model, optimizer, job.gradient_clipping), model, optimizer.param_groups)
    manager.shutdown(wait=False)
    del lighthouse


def fragments_of(model: nn.Module, count: int) -> list[nn.Module]:
    """Cut a Llama into ``count`` modules of about as many parameters, each of consecutive layers.

    Raises:
        ValueError: there are fewer layers, or one of them is so large that a fragment would have none.
    """
    if count == 1:
        return [model]
    inner = model.model
    parts = [inner.embed_tokens, *inner.layers, inner.norm]
    if model.lm_head.weight is not inner.embed_tokens.weight:
        parts.append(model.lm_head)
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
    fragments: list[list[nn.Module]] = [[] for _ in range(count)]
    before = 0
    for part, size in zip(parts, sizes, strict=True):
        fragments[int((before + size / 2) * count / sum(sizes))].append(part)
        before += size
    if not all(fragments):
        raise ValueError(f"{len(parts)} parts of {sizes} parameters make no {count} fragments; use fewer")
    return [nn.ModuleList(fragment) for fragment in fragments]


@contextlib.contextmanager
def _accelerate(run: Run, job: Job) -> Iterator[Stack]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    module = job.build()
    model, optimizer = accelerator.prepare(module, _adamw(job, module))
    steps = run.interval if run.talks else 10**6
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=steps, enabled=True) as local_sgd:

        def step(ids: Tensor) -> Tensor:
            loss: Tensor = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if job.gradient_clipping:
                accelerator.clip_grad_norm_(model.parameters(), job.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            local_sgd.step()
            return loss.detach()

        yield Stack(step, module, optimizer.param_groups)
        local_sgd.enabled = False  # what follows the last step is not measured


_STACKS: dict[str, Callable[[Run, Job], contextlib.AbstractContextManager[Stack]]] = {
    "torch": _torch,
    "DeepSpeed": _deepspeed,
    "DDP": _ddp,
    "ds_pso": _ds_pso,
    "torchft": torchft,
    "Accelerate": _accelerate,
}
