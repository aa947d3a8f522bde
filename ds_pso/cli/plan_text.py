"""The text of ``ds-pso plan``: a heading, a table, and the advice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_pso.utils.units import as_bit_rate, as_bytes, as_count

if TYPE_CHECKING:
    from ds_pso.cli.plan_inputs import Step
    from ds_pso.config.cost_model import Cluster, SyncCost
    from ds_pso.config.recommend import Option, Planner

_BILLION = 1e9  # tokens
_DAY_S = 86_400
_PRICE = "what an interval and a wire cost in loss: the tables named in docs/slow-networks.md"


def heading(model: str | None, cluster: Cluster, step: Step) -> str:
    """Return the lines that say what is planned for."""
    name = f"{model}: " if model else ""
    latency = f", {1e3 * cluster.latency_s:g} ms one way" if cluster.latency_s else ""
    return (
        f"{name}{as_count(cluster.parameters)} parameters, {cluster.particles} particles of {cluster.ranks}, "
        f"{as_bit_rate(cluster.bandwidth)} into each particle{latency}\n"
        f"a step takes {cluster.step_s:.3g} s: {step.source}\n"
    )


def table(options: Sequence[Option], cluster: Cluster, share: float, tokens: float | None) -> str:
    """Return the lines of these options.

    Args:
        options: what is compared.
        cluster: model, particles and link.
        share: compute share that is wanted.
        tokens: tokens of a step in a particle; None: not known, and nothing is said about tokens.
    """
    percent = f"for {100 * share:g} %"
    columns = [("", "", [option.name for option in options])]
    columns += [("compute", "share", [f"{100 * option.cost.compute_share:.1f} %" for option in options])]
    columns += [("MB", "a step", [_three_digits(option.cost.bytes_per_step / 1e6) for option in options])]
    if tokens is not None:
        steps = _BILLION / (tokens * cluster.particles)
        days = [steps * option.cost.seconds_per_step / _DAY_S for option in options]
        moved = [steps * option.cost.bytes_per_step / 1e9 for option in options]
        columns += [("GB per", "10^9 tokens", [_three_digits(gigabytes) for gigabytes in moved])]
        columns += [("days per", "10^9 tokens", [_three_digits(day) for day in days])]
    columns += [("interval", percent, [_interval(option, share) for option in options])]
    columns += [("bandwidth", percent, [_bandwidth(option.cost, cluster, share) for option in options])]
    widths = [max(map(len, (upper, lower, *cells))) for upper, lower, cells in columns]
    rows = zip(*((upper, lower, *cells) for upper, lower, cells in columns), strict=True)
    return "\n".join(_line(cells, widths) for cells in rows)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = cells
    return f"{name:{widths[0]}}" + "".join(
        f"  {cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True)
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _interval(option: Option, share: float) -> str:
    return "-" if option.is_synchronous else str(option.cost.interval_for(share))


def _bandwidth(cost: SyncCost, cluster: Cluster, share: float) -> str:
    slowdown = cost.slowdown_for(share)
    if slowdown == 0:
        return "-"  # latency alone is too much
    return "any" if math.isinf(slowdown) else as_bit_rate(cluster.bandwidth / slowdown)


def advice(planner: Planner, best: Option, is_enough: bool, share: float) -> str:
    """Return what is recommended, and why."""
    from ds_pso.config.cost_model import memory

    percent, reached = f"{100 * share:g} %", f"{100 * best.cost.compute_share:.1f} %"
    lines = ["", "recommended", f'  "swarm": {json.dumps(best.section)}']
    lines += [f'  "{key}": {json.dumps(value)}' for key, value in best.changes.items()]
    if not is_enough:
        lines += [f"  leaves {reached}, the most of what was tried; nothing leaves {percent} on this link"]
    elif best.is_synchronous:
        lines += [f"  leaves {reached}: the link carries gradients at every step"]
    else:
        lines += [f"  leaves {reached}, with the shortest interval of 1, 2, 4, ... that leaves {percent}"]
    wires = [f"{interval} in {wire}" for wire, interval in planner.shortest_intervals(share).items()]
    if best.swarm is not None:
        needed = memory(planner.cluster, best.swarm)
        more = as_bytes(needed.pending + needed.exchange)
        lines += [f"  takes {as_bytes(needed.kept)} of memory on each rank, and {more} more during a sync"]
    lines += [f"  without a delay {percent} takes an interval of {', '.join(wires)}"] if wires else []
    return "\n".join([*lines, f"  {_PRICE}"])
