"""The cost of plain data parallel training over a link: what DeepSpeed moves at every step, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping

from ds_pso.config.cost_model import Cluster, SyncCost

_MAX_REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default for stage3_max_reuse_distance
_HALF_PRECISION = ("bf16", "fp16", "bfloat16")  # sections of the DeepSpeed JSON; the last is an older name


def synchronous_cost(cluster: Cluster, ds_config: Mapping[str, object], backend: str = "nccl") -> SyncCost:
    """Compute the cost of all ranks as one DeepSpeed world, whose gradients cross the link at every optimizer step.

    DeepSpeed 0.19 calls collectives over all W = P S ranks. In a ring of them what enters a particle is what one rank
    receives. With G and M the bytes of all gradients and of all weights, and k ``gradient_accumulation_steps``:

        stage 0     2 G (W - 1) / W             all-reduce of gradients (engine.allreduce_gradients)
        stage 1     (2 G + M) (W - 1) / W       and all-gather of weights (stage_1_and_2.py: average_tensor, which
                                                all-reduces also where reduce_scatter is set, and step)
        stage 2     (2 k G + M) (W - 1) / W     gradients are not kept whole, so each micro batch reduces them
        stage 3     k (G + M + R) (W - 1) / W   reduce-scatter (stage3.py: __avg_scatter_grads), all-gather in the
                                                forward pass, and again in the backward pass of what was released (R)

    Under gloo, reduce-scatter is an all-reduce, 2 G; and in an all-gather between two ranks the two directions of the
    link take turns. Not counted: ZeRO++, and what ``overlap_comm`` hides behind the backward pass.

    Args:
        cluster: model, particles and link.
        ds_config: DeepSpeed's part of the config.
        backend: ``nccl`` or ``gloo``: that of DeepSpeed's collectives.
    """
    zero, stage = _section(ds_config, "zero_optimization"), zero_stage(ds_config)
    reduced = gradient_bytes(ds_config) * cluster.parameters
    gathered = _weight_bytes(ds_config) * cluster.parameters if stage else 0.0
    micro_batches = _whole(ds_config, "gradient_accumulation_steps", 1)
    reductions = 1.0 if stage == 3 and backend != "gloo" else 2.0
    if stage >= 2:
        reduced *= micro_batches
    if stage == 3:
        gathered *= micro_batches * (1 + _released_share(cluster.parameters, zero))
    world = cluster.particles * cluster.ranks
    ring = (world - 1) / world
    nbytes = (reductions * reduced + gathered) * ring
    in_turns = gathered * ring if backend == "gloo" and world == 2 else 0.0
    messages = (world - 1) * ((reductions if reduced else 0) + (1 if gathered else 0))
    return SyncCost(
        "gradients",
        interval=1,
        delay=0,
        megabytes=nbytes / 1e6,
        transfer_s=8 * (nbytes + in_turns) / cluster.bandwidth,
        latency_s=messages * cluster.latency_s,
        step_s=cluster.step_s,
    )


def zero_stage(ds_config: Mapping[str, object]) -> int:
    """Return the ZeRO stage of a config, 0 to 3."""
    return min(3, _whole(_section(ds_config, "zero_optimization"), "stage", 0))


def gradient_bytes(ds_config: Mapping[str, object]) -> int:
    """Return the bytes of a gradient on its way: those of ``communication_data_type``, or of the working precision."""
    chosen = ds_config.get("communication_data_type")
    return _weight_bytes(ds_config) if chosen is None else 4 if chosen == "fp32" else 2


def _weight_bytes(ds_config: Mapping[str, object]) -> int:
    return 2 if any(_section(ds_config, name).get("enabled") for name in _HALF_PRECISION) else 4


def _released_share(parameters: float, zero: Mapping[str, object]) -> float:
    """Share of the weights that ZeRO 3 releases after the forward pass, and gathers again for the backward pass.

    A weight is kept if fewer than ``stage3_max_reuse_distance`` weights are used in between; of the weight before which
    there are x others these are 2 (M - x) (partitioned_param_coordinator.py: __params_to_release).
    """
    kept = _whole(zero, "stage3_max_reuse_distance", _MAX_REUSE_DISTANCE) / 2
    return max(0.0, 1 - kept / parameters)


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _whole(section: Mapping[str, object], key: str, default: int) -> int:
    """Return a number of the config; the default for ``"auto"``, and for what DeepSpeed will refuse."""
    value = section.get(key, default)
    return int(value) if isinstance(value, int | float) and value >= 0 else default
