"""The cost of a sync point on a given link, in bytes, seconds and memory: arithmetic, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ds_pso.comm.compression import UNCOMPRESSED, bytes_per_element, is_partial, mean_bytes
from ds_pso.config.schema import SwarmConfig
from ds_pso.rules import Rule, RuleMemory, SyncPoint

# First and second ones, by the name of DeepSpeed's optimizer.
_MOMENTS = {"adam": (1, 1), "adamw": (1, 1), "lamb": (1, 1), "fusedlamb": (1, 1), "lion": (1, 0), "muon": (1, 0)}
_MESSAGES_OF_A_SYNC = 5  # one after the other: the barrier, losses, distances


@dataclass(frozen=True)
class Cluster:
    """The training that costs are computed for: model, particles and link.

    Args:
        parameters: trained parameters, M.
        particles: P; each has a link of its own to the others, which its ranks share.
        ranks: ranks of a particle, S.
        step_s: seconds of an optimizer step inside a particle.
        bandwidth: bit/s of the link in each direction.
        latency_s: seconds of a message, one way.
        moments: first and second ones that the optimizer keeps for each parameter.
    """

    parameters: float
    particles: int
    ranks: int
    step_s: float
    bandwidth: float
    latency_s: float = 0.0
    moments: tuple[int, int] = (1, 1)


def moments_kept(ds_config: Mapping[str, object]) -> tuple[int, int] | None:
    """Return the first and second moments that the optimizer keeps for each parameter; None if it is not known.

    What Muon leaves to Adam, embeddings and vectors, has a second moment, too; it is not counted.
    """
    section = ds_config.get("optimizer")
    if not isinstance(section, Mapping):
        return None
    params = section.get("params")
    kind, options = str(section.get("type")).lower(), params if isinstance(params, Mapping) else {}
    if kind == "sgd":
        return (1, 0) if options.get("momentum") else (0, 0)
    return _MOMENTS.get(kind)


@dataclass(frozen=True)
class SyncCost:
    """The cost of a sync point, and the interval and delay over which it spreads."""

    wire: str
    interval: int  # optimizer steps between two syncs of the whole model, n
    delay: int
    megabytes: float  # into each particle at a sync point; of moments with a period of their own, on average
    transfer_s: float  # seconds of the bytes
    latency_s: float  # seconds of the messages
    step_s: float
    waits: bool = True  # false: particles that wait for nobody
    turns: int = 1  # sync points in an interval, each of a part of the model

    @property
    def exchange_s(self) -> float:
        """Seconds of the exchange, bytes and messages."""
        return self.transfer_s + self.latency_s

    @property
    def held_up_s(self) -> float:
        """Seconds for which training stands still at a sync point."""
        return max(0.0, self.exchange_s - self.delay * self.step_s) if self.waits else 0.0

    @property
    def compute_share(self) -> float:
        """Share of the time in which training goes on."""
        training = self.interval / self.turns * self.step_s
        return training / (training + self.held_up_s)

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimizer step, with its part of the sync points."""
        return self.step_s / self.compute_share

    @property
    def bytes_per_step(self) -> float:
        """Bytes into each particle, spread over the optimizer steps."""
        return 1e6 * self.megabytes * self.turns / self.interval

    def interval_for(self, share: float) -> int:
        """Return the smallest interval with this compute share."""
        least = self.held_up_s * share / ((1 - share) * self.step_s)
        return self.turns * max(1, self.delay, math.ceil(least - 1e-9))

    def delay_for(self, share: float) -> int:
        """Return the smallest delay with this compute share; more than the interval if none is enough."""
        allowed = self.interval / self.turns * self.step_s * (1 / share - 1)
        return max(0, math.ceil((self.exchange_s - allowed) / self.step_s - 1e-9)) if self.waits else 0

    def slowdown_for(self, share: float) -> float:
        """Return the factor by which the bandwidth may shrink for this compute share; 0: latency is too much."""
        allowed = (self.interval / self.turns * (1 / share - 1) + self.delay) * self.step_s - self.latency_s
        return max(0.0, allowed / self.transfer_s) if self.waits and self.transfer_s else math.inf


def sync_cost(cluster: Cluster, swarm: SwarmConfig, wire: str | None = None) -> SyncCost:
    """Compute the cost of a sync point of this config.

    Exchanges are counted as in docs/slow-networks.md, in both directions at once. Updates, rounding and forward
    passes on a probe batch take time that is not in it.

    Args:
        wire: replaces that of the config.
    """
    rule = swarm.build_rule()
    assert rule is not None, "allreduce has no sync points"
    wire = wire or swarm.wire
    P, parameters = cluster.particles, cluster.parameters / swarm.turns  # of a sync point
    per_rank = parameters / cluster.ranks
    num_buckets = max(1, math.ceil(4 * per_rank / (swarm.bucket_mb * 2**20)))
    received, sent, messages = 0.0, 0.0, float(_MESSAGES_OF_A_SYNC)
    options = swarm.options_of(wire)
    for kind, sources in _exchanges(rule, P, swarm.sync_interval):
        if kind == "mean":
            nbytes = parameters * mean_bytes(wire, P, options)
            received, sent = received + nbytes, sent + nbytes
            messages += num_buckets * (2 * (P - 1) if wire == UNCOMPRESSED else 1 if is_partial(wire) else 2)
        else:
            nbytes = parameters * (4.0 if kind == "newest" else bytes_per_element(wire, options))
            # Who sends to all is the root of a tree; in a ring each sends to those who follow it.
            copies = math.ceil(math.log2(P)) if len(set(sources)) == 1 else max(map(sources.count, sources), default=1)
            received, sent = received + nbytes, sent + nbytes * copies
            messages += num_buckets * copies
    moments = moments_per_sync(cluster, swarm)
    nbytes = parameters * mean_bytes(swarm.moments.wire, P) * moments
    received, sent = received + nbytes, sent + nbytes
    messages += moments * num_buckets * (2 * (P - 1) if swarm.moments.wire == UNCOMPRESSED else 2)
    return SyncCost(
        wire,
        swarm.sync_interval,
        swarm.delay,
        received / 1e6,
        8 * max(received, sent) / cluster.bandwidth,
        messages * cluster.latency_s,
        cluster.step_s,
        waits=rule.max_staleness is None,
        turns=swarm.turns,
    )


def moments_per_sync(cluster: Cluster, swarm: SwarmConfig) -> float:
    """Return how many moments of each parameter travel at a sync point, on average."""
    if swarm.optimizer_state != "average":
        return 0.0
    first, second = cluster.moments
    return first / swarm.moments.first_every + second / swarm.moments.second_every


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most, beside what DeepSpeed takes."""

    kept: float  # state, from one sync point to the next
    pending: float  # besides, while a delayed sync point is on its way
    exchange: float  # besides, while peers exchange


def memory(cluster: Cluster, swarm: SwarmConfig) -> Memory:
    """Compute the memory that a rank needs for this config, by the table in docs/slow-networks.md.

    Where fragments sync one at a time, as much of one may lie on a rank as fits into its shard: ZeRO 0 to 2 give a rank
    a run of the model, and fragments are cut by the model.
    """
    rule, P = swarm.build_rule(), cluster.particles
    assert rule is not None, "allreduce has no sync points"
    shard = cluster.parameters / cluster.ranks  # elements
    rough = 2 if swarm.state_dtype == "bf16" else 4
    state = sum(rough if name in rule.rough_state else 4 for name in rule.state_names)
    if swarm.wire != UNCOMPRESSED:
        state += 4 + (rough if swarm.residual == "wire" else 0)
    if rule.max_staleness is not None:
        return Memory((state + 4 * (2 * (P - 1) + 1)) * shard, 0.0, 0.0)
    part = 4 * min(shard, cluster.parameters / swarm.turns)
    bucket, wire = min(part, swarm.bucket_mb * 2**20), bytes_per_element(swarm.wire, swarm.wire_options) / 4
    exchange = 0.0
    for kind, sources in _exchanges(rule, P, swarm.sync_interval):
        buckets = 1.0
        if kind == "mean" and swarm.wire != UNCOMPRESSED:
            buckets += 2 + wire * (1 + P) if is_partial(swarm.wire) else wire * (2 - 1 / P)  # sums, and their weights
            buckets += swarm.residual == "weights"
        elif kind == "one" and swarm.wire != UNCOMPRESSED:
            buckets += wire
        elif len(set(sources)) > 1:
            buckets += 1 + max(map(sources.count, sources))  # the one received, and a copy for each that asks
        exchange = max(exchange, buckets * bucket)
    if rule.keeps_lengths_from is not None and P > 1:
        exchange += 4 * shard  # the whole mean, before it is given its length
    pending = part if swarm.delay else 0.0
    if swarm.optimizer_state == "average" and P > 1:
        moments = sum(cluster.moments)
        buckets = 1.0
        if swarm.moments.rounds:
            state += rough * moments
            buckets += bytes_per_element(swarm.moments.wire) / 4 * (2 - 1 / P)
        exchange = max(exchange, buckets * bucket)
        if swarm.delay:  # where they begin, and while they travel once more
            pending += 4 * shard * moments
            exchange += 4 * shard * moments
    return Memory(state * shard, pending, exchange)


def _exchanges(rule: Rule, num_particles: int, steps: int) -> list[tuple[str, tuple[int, ...]]]:
    """List what the plans of the rule move, at an ordinary sync point with equally good particles."""
    equal = (1.0,) * num_particles
    memory: RuleMemory = {}
    for index in range(2):  # the first has no past
        step = rule.plan(SyncPoint(index, equal, (True,) * num_particles, 1000, (steps,) * num_particles), memory)
        found = [step]
        while step.score:
            step = rule.proceed(step, equal)
            found.append(step)
        memory = step.memory
    return [(step.receive, step.sources) for step in found if step.receive != "nothing"]
