"""Settings for a link: those that are compared, and the one that is recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ds_pso.comm.compression import UNCOMPRESSED
from ds_pso.config.cost_model import Cluster, SyncCost, sync_cost
from ds_pso.config.load import is_allowed, load_config
from ds_pso.config.presets import ALLREDUCE, rule_of
from ds_pso.config.schema import SwarmConfig
from ds_pso.config.synchronous import gradient_bytes, synchronous_cost, zero_stage

INTERVALS = tuple(2**k for k in range(11))  # optimizer steps
WIRES = (UNCOMPRESSED, "int4", "sparse")  # of a difference: all of it, four bits of each element, the largest alone
_SHORTEST_SPARSE = 4  # steps, but with Muon 1; the authors of SparseLoCo (arXiv 2508.15706) sync every 15 to 30
_OVERLAPPED_WIRES = (UNCOMPRESSED, "int4")  # what sparse leaves out comes late in any case
_DELAYS_OF_AN_INTERVAL = 4  # at least: most of the time a particle works with what the others know
_FRAGMENTS = 4  # of streaming
_STREAMING: Mapping[str, object] = {"streaming": True, "fragments": _FRAGMENTS}
_LONGEST_STREAMING_DELAY = 4  # steps; Streaming DiLoCo (arXiv 2501.18512) finds no cost below 5
# Keys of the section that an option sets, or that are allowed with some values of those only.
_SET_ANEW = {"sync_interval", "wire", "delay", "fragments", "streaming", "schedule", "residual", "residual_decay"}
_SET_ANEW |= {"state_dtype", "state_device"}


@dataclass(frozen=True)
class Option:
    """One way to train over a link.

    Attributes:
        name: what it is called in a table.
        cost: its bytes and seconds.
        section: the ``swarm`` section.
        swarm: the same, checked; None for plain data parallel training.
        changes: other keys of the DeepSpeed JSON that it sets.
    """

    name: str
    cost: SyncCost
    section: Mapping[str, object]
    swarm: SwarmConfig | None = None
    changes: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_synchronous(self) -> bool:
        """True of plain data parallel training."""
        return self.swarm is None


class Planner:
    """The options that a config leaves over a link.

    Args:
        cluster: model, particles and link.
        ds_config: DeepSpeed's part of the config.
        section: the ``swarm`` section as it was written; what an option does not set stays as it is.
        backend: of DeepSpeed's collectives, ``nccl`` or ``gloo``.

    Raises:
        ConfigError: the section is not valid.
    """

    def __init__(
        self, cluster: Cluster, ds_config: Mapping[str, object], section: Mapping[str, object], backend: str
    ) -> None:
        self.cluster = cluster
        self._ds_config, self._backend = ds_config, backend
        self._kept = {key: value for key, value in section.items() if key not in _SET_ANEW}
        mode = str(section.get("sync_mode", "local_sgd"))
        self._kept["sync_mode"] = "local_sgd" if mode == ALLREDUCE else rule_of(mode)
        self._swarm = load_config({**ds_config, "swarm": self._kept})[1]

    def every_step(self) -> Iterator[Option]:
        """Yield plain data parallel training, as it is configured, and with gradients in half precision."""
        nbytes = gradient_bytes(self._ds_config)
        variants: list[tuple[int, dict[str, object]]] = [(nbytes, {})]
        if nbytes > 2:
            variants.append((2, {"communication_data_type": "bf16"}))
        for size, changes in variants:
            cost = synchronous_cost(self.cluster, {**self._ds_config, **changes}, self._backend)
            name = f"ZeRO {zero_stage(self._ds_config)}, every step, {8 * size}-bit gradients"
            yield Option(name, cost, {"sync_mode": ALLREDUCE}, changes=changes)

    def syncing(self, interval: int, wire: str, **changes: object) -> Option | None:
        """Return particles that sync in this way; None: the config excludes it."""
        changes = {"sync_interval": interval, "wire": wire, **changes}
        if wire == "sparse" and self._uses_muon:
            changes["residual"] = "weights"
        if not is_allowed(self._ds_config, self._swarm, **changes):
            return None
        swarm = self._swarm.model_copy(update=changes)
        return Option(name_of_setting(swarm), sync_cost(self.cluster, swarm), {**self._kept, **changes}, swarm)

    def recommend(self, share: float) -> tuple[Option, bool]:
        """Return the option that syncs most often, and true if it leaves this compute share.

        Every step if the link carries that. Otherwise the shortest of ``INTERVALS``; and of the options that leave the
        share with it the first: without a delay the wire that withholds least, then with a delay, then streaming. If
        nothing leaves the share: the option that leaves most.
        """
        tried = []
        for option in self._from_most_often(share):
            if option.cost.compute_share >= share:
                return option, True
            tried.append(option)
        return max(tried, key=lambda option: option.cost.compute_share), False

    def shortest_intervals(self, share: float) -> dict[str, int]:
        """Return the shortest interval of each wire for this compute share, without a delay."""
        options = {wire: self.syncing(1, wire) for wire in WIRES}
        return {
            wire: max(option.cost.interval_for(share), self._shortest(wire))
            for wire, option in options.items()
            if option is not None
        }

    @property
    def _uses_muon(self) -> bool:
        """True where what is not sent must stay in the weights: Muon's updates are dense."""
        optimizer = self._ds_config.get("optimizer")
        return isinstance(optimizer, Mapping) and str(optimizer.get("type")).lower() == "muon"

    def _shortest(self, wire: str) -> int:
        return _SHORTEST_SPARSE if wire == "sparse" and not self._uses_muon else 1

    def _from_most_often(self, share: float) -> Iterator[Option]:
        yield from self.every_step()
        for interval in INTERVALS:
            wires = [wire for wire in WIRES if interval >= self._shortest(wire)]
            options = [self.syncing(interval, wire) for wire in wires]
            for longest, keys in (
                (interval // _DELAYS_OF_AN_INTERVAL, {}),
                (min(_LONGEST_STREAMING_DELAY, interval // (2 * _FRAGMENTS)), _STREAMING),
            ):
                options += [self._overlapped(interval, wire, longest, share, keys) for wire in _OVERLAPPED_WIRES]
            yield from (option for option in options if option is not None)

    def _overlapped(
        self, interval: int, wire: str, longest: int, share: float, keys: Mapping[str, object]
    ) -> Option | None:
        """Return the option with the shortest delay that leaves the share; None: it would have to be longer."""
        option = self.syncing(interval, wire, delay=1, **keys) if longest else None
        delay = max(1, option.cost.delay_for(share)) if option is not None else 0
        return self.syncing(interval, wire, delay=delay, **keys) if 0 < delay <= longest else None


def name_of_setting(swarm: SwarmConfig) -> str:
    """Return mode, interval (with a schedule that at first), wire and overlap: ``local_sgd, n = 8, int4, delay 2``."""
    parts = [swarm.sync_mode, f"n = {swarm.sync_interval}", swarm.wire]
    parts += [f"delay {swarm.delay}"] if swarm.delay else []
    parts += [f"streaming {swarm.fragments}"] if swarm.streaming else []
    parts += [swarm.schedule.type] if swarm.schedule.type != "fixed" else []
    return ", ".join(parts)
