"""Checks that measure: memory, the time of an exchange, how long training is held up, and a row of a comparison."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from integration.jobs import Case, build_engine, config

import ds_pso
from ds_pso.config.cost_model import Cluster
from ds_pso.config.cost_model import memory as memory_of
from gpu.features import llama, train_llama
from gpu.training import NEVER, ON_GPU, clean_up, over_gloo

MB = 1e6
_SLACK = 96e6  # chunks of temporaries: bytes, see docs/slow-networks.md
_WHOLE_SHARD = {"bucket_mb": 4096.0}  # a bucket is never smaller than the shard


def memory(folder: Path) -> str:
    layers, width = (8, 1024) if ON_GPU else (2, 64)
    kinds = {
        "local_sgd": Case(),
        "diloco": Case(sync_mode="diloco"),
        "diloco in bf16": Case(sync_mode="diloco", swarm={"state_dtype": "bf16"}),
        "local_sgd, int4": Case(swarm={"wire": "int4"}),
        "diloco, sparse": Case(sync_mode="diloco", swarm={"wire": "sparse"}),
        "pso with inertia": Case(sync_mode="pso", options={"inertia": 0.5}),
    }
    world, lines = None, []
    for name, kind in kinds.items():
        case = over_gloo(replace(kind, lr=1e-4, interval=NEVER, swarm={**_WHOLE_SHARD, **kind.swarm}))
        swarm = ds_pso.init(config(case, 1), world=world)
        world = swarm.world
        engine = build_engine(case, swarm.ds_config, llama(layers, width))
        parameters = sum(p.numel() for p in engine.module.parameters())
        formula = memory_of(Cluster(parameters, 2, 1, 1.0, 1e9), swarm.config)
        alone = _allocated()
        swarm.attach(engine)
        kept = _allocated() - alone
        updater = swarm.session.synchronizer.parts.updater
        tensors = [tensor for state in updater.state for tensor in state.values()]
        if updater.differences is not None:
            tensors += [*updater.differences.common, *updater.differences.residual]
        state = sum(tensor.nbytes for tensor in tensors)
        assert abs(state - formula.kept) <= 0.01 * formula.kept, f"{name}: {state} bytes of state, not {formula.kept}"
        train_llama(engine, swarm.particle, 2)
        before = _allocated()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        swarm.sync()
        sync = torch.cuda.max_memory_allocated() - before if ON_GPU else 0
        if ON_GPU:
            assert abs(kept - formula.kept) < 0.02 * formula.kept + 4e6, f"{name}: keeps {kept} of {formula.kept} bytes"
            assert sync < formula.exchange + _SLACK, f"{name}: a sync takes {sync} of {formula.exchange} bytes"
            lines.append(
                f"{name}: kept {kept / MB:.0f} (formula {formula.kept / MB:.0f}), sync {sync / MB:.0f} "
                f"({formula.exchange / MB:.0f})"
            )
        else:
            lines.append(f"{name}: kept {state / MB:.1f} ({formula.kept / MB:.1f})")
        del swarm, engine, updater, tensors
        clean_up()
    return f"MB, {4 * parameters / MB:.0f} of weights: {'; '.join(lines)}"


def _allocated() -> int:
    clean_up()
    return torch.cuda.memory_allocated() if ON_GPU else 0


def exchange(folder: Path) -> str:
    from benchmarks.sync_cost.__main__ import Case as CostCase
    from benchmarks.sync_cost.__main__ import measure
    from ds_pso.comm.exchange import Exchange
    from ds_pso.distributed.static_world import carve

    numel = 10**8 if ON_GPU else 10**5
    world = carve(2, peer_backend="gloo", timeout_s=60)
    peers, found = Exchange(world, bucket_mb=64), []
    for rule, wire in (("local_sgd", "fp32"), ("diloco", "fp32"), ("local_sgd", "int4"), ("local_sgd", "sparse")):
        cost = measure(CostCase(rule, wire, numel, 2, "cuda" if ON_GPU else "cpu"), peers, runs=2)
        found.append(f"{rule} {wire} {cost.collectives_s:.2f} + {cost.rest_s:.2f}")
    world.close()
    return f"{numel:.0e} elements, two ranks of one machine: {'; '.join(found)}"


def overlap(folder: Path) -> str:
    layers, width = (8, 768) if ON_GPU else (1, 32)
    steps, interval = 24, 8
    kinds: dict[str, dict[str, Any]] = {"alone": {}, "waits": {}, "delay 4": {"delay": 4}}
    world, found = None, {}
    for name, section in kinds.items():
        case = over_gloo(Case(lr=1e-4, interval=NEVER if name == "alone" else interval, swarm=section))
        swarm = ds_pso.init(config(case, 1), world=world)
        world = swarm.world
        engine = build_engine(case, swarm.ds_config, llama(layers, width))
        swarm.attach(engine)
        train_llama(engine, swarm.particle, 2 if name == "alone" else interval)  # warms up, to the first sync
        swarm.finish_pending()
        records: list[Any] = []
        swarm.on_sync(records.append)
        swarm.world.gather("begin together", True)
        begin = time.perf_counter()
        train_llama(engine, swarm.particle, steps)
        swarm.finish_pending()
        if ON_GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        assert len(records) == (0 if name == "alone" else steps // interval)
        held = sum(record.seconds for record in records) / max(1, len(records))
        beside = sum(record.overlapped_s for record in records) / max(1, len(records))
        found[name] = f"{name}: {seconds / steps:.3f} s a step"
        if records:
            found[name] += f", a sync holds up {held:.3f} s and goes on beside for {beside:.3f} s"
        del swarm, engine
        clean_up()
    return "; ".join(found.values())


def convergence(folder: Path) -> str:
    from benchmarks.convergence.cells import Cell
    from benchmarks.convergence.tasks import TASKS
    from benchmarks.convergence.train import config_of
    from benchmarks.convergence.train import train as train_cell

    particles, interval, scale = 4, 8, 2.0
    task = TASKS["gpt_small"]
    steps = round(task.samples * scale) // (particles * task.batch) if ON_GPU else 4
    found = []
    for rule in ("allreduce", "local_sgd", "diloco"):
        every = 0 if rule == "allreduce" else interval
        cell = Cell("gpt_small", rule, particles, every, steps, seed=1, lr=task.lr, scale=scale)
        section = config_of(cell, world_size=cell.num_worlds, zero_stage=0)
        outcome = ds_pso.simulate(section, lambda swarm, cell=cell: train_cell(swarm, cell))[0]
        assert outcome.loss == outcome.loss, f"{rule}: the loss is not finite"
        found.append(f"{rule} {outcome.loss:.3f} in {outcome.seconds:.0f} s")
        clean_up()
    what = f"gpt_small --scale {scale:g}, P = {particles}, n = {interval}, {steps} steps"
    return f"held-out loss of {what}: {', '.join(found)}"
