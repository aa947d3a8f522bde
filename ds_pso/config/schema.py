"""The ``swarm`` section of a DeepSpeed JSON config: its keys, their types, ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ds_pso.comm.compression import UNCOMPRESSED, wire_names, wire_options
from ds_pso.config.presets import ALLREDUCE, sync_modes
from ds_pso.distributed.transports import TRANSPORTS
from ds_pso.elastic.config import ElasticConfig
from ds_pso.rules import Rule, RuleConfig, find_rule
from ds_pso.sync.moment_options import ALL_AT_EACH_SYNC, MomentOptions
from ds_pso.sync.schedule import NEVER, Schedule, ScheduleConfig, make_schedule
from ds_pso.utils.remote_folder import check_address
from ds_pso.utils.strict_model import StrictModel

# What travels between particles, in which form, what hides that, and what is compared.
_OF_AN_EXCHANGE = (
    *("wire", "residual", "residual_decay", "delay", "fragments", "streaming", "mixing"),
    "expert_load",
)


def total_num_steps(ds_config: Mapping[str, object]) -> object:
    """Return ``total_num_steps`` of DeepSpeed's scheduler, unchecked; None if the config does not have it."""
    scheduler = ds_config.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, dict) else None
    return params.get("total_num_steps") if isinstance(params, dict) else None


class ParticleConfig(StrictModel):
    """An entry of ``swarm.per_particle``: DeepSpeed's keys of these names, for one particle alone."""

    train_micro_batch_size_per_gpu: int | None = Field(
        default=None, ge=1, description="Samples of a micro batch on each of its ranks."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None, ge=1, description="Micro batches of an optimizer step."
    )

    def filled_in(self, ds_config: Mapping[str, Any]) -> ParticleConfig:
        """Return the entry with what it does not say taken from the part that is for all."""
        given = {"gradient_accumulation_steps": 1, **ds_config}
        return ParticleConfig(**{key: value or given.get(key) for key, value in self})

    @property
    def samples_of_a_rank(self) -> int:
        """Samples of an optimizer step, on each rank, of an entry that is filled in."""
        assert self.train_micro_batch_size_per_gpu is not None
        assert self.gradient_accumulation_steps is not None
        return self.train_micro_batch_size_per_gpu * self.gradient_accumulation_steps


class SwarmConfig(StrictModel):
    """The ``swarm`` section. Options of a rule, or of a wire, lie in a subsection with its name."""

    particles: int | Literal["node"] = Field(default="node", description="Number of particles P, or one per node.")
    sync_mode: str = Field(
        default="local_sgd",
        description="`allreduce` (plain DeepSpeed over all ranks), the name of a rule or a preset, or your own rule as "
        "`my_module:MyRule`.",
    )
    sync_interval: int = Field(
        default=32,
        ge=1,
        description="Optimizer steps after which the whole model has been synced again; `never`: only where the script "
        "says so, for particles that become experts.",
    )
    per_particle: list[ParticleConfig] = Field(
        default=[],
        description="Batch of each particle, in their order, where some have faster machines: see "
        "`swarm.per_particle` below.",
    )
    particle_weights: Literal["samples", "equal"] = Field(
        default="samples",
        description="Weights of the particles in a mean: in proportion to what each has trained on since the last "
        "sync, or all the same.",
    )
    schedule: ScheduleConfig = Field(
        default=ScheduleConfig(), description="How the interval changes: see `swarm.schedule` below."
    )
    delay: int = Field(
        default=0,
        ge=0,
        description="Apply the result of a sync point so many optimizer steps later, and exchange in the background "
        "meanwhile; 0: training waits.",
    )
    fragments: int = Field(
        default=1,
        ge=1,
        description="Cut a delayed sync point into so many fragments of equal size, which are exchanged and applied "
        "one after the other within `delay`: the layers in turn, from the first on.",
    )
    streaming: bool = Field(
        default=False,
        description="Sync each fragment by itself, one after the other, evenly spread over the interval.",
    )
    mixing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of what a delayed sync point brings that a particle does not take over (alpha); 0: it takes "
        "all.",
    )
    fitness: Literal["train", "probe"] = Field(
        default="train",
        description="Loss that ranks the particles: mean training loss since the last sync, or a probe batch.",
    )
    quarantine_loss: float | None = Field(
        default=4.0,
        gt=1,
        description="Leave a particle out of a sync point, and restart it from the others, when its loss, divided by "
        "the highest so far, is more than so many times the median of the others', beyond chance; `null`: never.",
    )
    quarantine_norm: float | None = Field(
        default=10.0,
        gt=1,
        description="Likewise when the norm of its weights is more than so many times the median of the others', as "
        "after a flipped bit in memory; `null`: never.",
    )
    optimizer_state: Literal["keep", "average", "reset"] = Field(
        default="keep",
        description="The optimizer's moments at a sync point: each particle keeps its own, all take their mean "
        "(with Adam 16 N (P - 1) / P bytes more, unless `moments` says otherwise), or the optimizer begins anew.",
    )
    moments: MomentOptions = Field(
        default=ALL_AT_EACH_SYNC,
        description='With `"optimizer_state": "average"`: when they are averaged, and how they travel: see '
        "`swarm.moments` below.",
    )
    total_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps of the whole training, for rules that change over it; unless given, "
        "`scheduler.params.total_num_steps`.",
    )
    wire: str = Field(
        default=UNCOMPRESSED,
        description="How weights travel: as they are, or as differences to the last common state, rounded or only the "
        "largest of them, and what is withheld sent with the next ones.",
    )
    residual: Literal["wire", "weights"] = Field(
        default="wire",
        description="Where what a wire withholds waits for the next sync: in a tensor of the wire, and is taken from "
        "the weights; or in the weights of the particle that withholds it.",
    )
    residual_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="What waits in the wire is multiplied by this at each sync.",
    )
    state_device: Literal["auto", "cpu"] = Field(
        default="auto",
        description="Where the state of the rule and of the wire lies between sync points: beside the shard, or in "
        "main memory.",
    )
    state_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="How movements in that state are kept: momenta, velocities, and the residual of the wire. "
        "Positions are always kept in fp32.",
    )
    expert_load: bool = Field(
        default=False,
        description="Record at each sync point how far the particles of a mixture of experts are apart in the share of "
        "tokens that their routers give to each expert.",
    )
    bucket_mb: float = Field(default=64.0, gt=0, le=4096, description="Exchange buffer, in MiB.")
    checksums: bool = Field(
        default=False,
        description="Compare checksums after each collective between particles, and repeat what was damaged "
        "on the way.",
    )
    peer_backend: Literal["auto", "gloo", "nccl"] = Field(
        default="auto", description="Collectives between particles: NCCL on GPUs and gloo on CPU unless named."
    )
    transport: str = Field(
        default="static",
        description="`static`: all particles in one launch. `elastic`: each is a job of its own, started by "
        "`ds-pso launch`, and the others go on without it.",
    )
    elastic: ElasticConfig = Field(
        default=ElasticConfig(),
        description="When an elastic swarm goes on without a particle: see `swarm.elastic` below.",
    )
    timeout_s: float = Field(
        default=600.0, gt=0, le=10_000_000, description="Longest wait for another rank, in seconds."
    )
    remote_checkpoints: str | None = Field(
        default=None,
        description="Where the checkpoints of `swarm.save` shall also lie, uploaded while training goes on: an address "
        "that fsspec knows, such as `s3://bucket/run`, for this run alone; `null`: nowhere.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the random factors of the rules.")

    _rule_options: dict[str, RuleConfig] = PrivateAttr(default_factory=dict)
    _wire_options: dict[str, StrictModel] = PrivateAttr(default_factory=dict)

    @field_validator("particles", mode="before")
    @classmethod
    def _particles(cls, value: object) -> object:
        if value == "node" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError('must be a whole number of at least 1, or "node" for one particle per node')

    @field_validator("sync_interval", mode="before")
    @classmethod
    def _sync_interval(cls, value: object) -> object:
        return NEVER if value == "never" else value

    @field_validator("sync_mode")
    @classmethod
    def _sync_mode(cls, value: str) -> str:
        if value != ALLREDUCE:
            find_rule(value, known=sync_modes()[1:])
        return value

    @field_validator("wire", mode="before")
    @classmethod
    def _wire(cls, value: object) -> object:
        *names, last = wire_names()
        if value not in (*names, last):
            raise ValueError(f"must be {', '.join(map(repr, names))} or {last!r}")
        return value

    @field_validator("transport", mode="before")
    @classmethod
    def _transport(cls, value: object) -> object:
        if not isinstance(value, str) or value not in TRANSPORTS:
            raise ValueError(f"must be {' or '.join(map(repr, TRANSPORTS))}")
        return value

    @field_validator("remote_checkpoints")
    @classmethod
    def _remote_checkpoints(cls, value: str | None) -> str | None:
        if value is not None:
            check_address(value)
        return value

    @model_validator(mode="after")
    def _one_entry_each(self) -> Self:
        if self.per_particle and self.sync_mode == ALLREDUCE:
            raise ValueError('per_particle: "allreduce" makes all ranks one particle; remove it')
        if self.per_particle and len(self.per_particle) != self.particles:
            raise ValueError(
                f"per_particle has {len(self.per_particle)} entries, and particles = {self.particles!r}; give a number "
                "of particles, and an entry for each"
            )
        return self

    @property
    def never_syncs(self) -> bool:
        """True if particles sync only where the script says so."""
        return self.sync_interval == NEVER

    @property
    def rule_options(self) -> RuleConfig | None:
        """Validated options of the active rule; None for ``allreduce``."""
        if self.sync_mode == ALLREDUCE:
            return None
        return self._rule_options[self.sync_mode]

    @property
    def wire_options(self) -> StrictModel | None:
        """Validated options of the wire; None where it has none."""
        return self.options_of(self.wire)

    def options_of(self, wire: str) -> StrictModel | None:
        """Return the options that a wire would have in this section; None where it has none."""
        classes = wire_options()
        return self._wire_options.get(wire) or classes[wire]() if wire in classes else None

    @property
    def turns(self) -> int:
        """Number of parts into which an interval is divided, each with a sync point for a part of the model."""
        return self.fragments if self.streaming else 1

    def build_rule(self) -> Rule | None:
        """Return the rule that ``sync_mode`` names; None for ``allreduce``."""
        options = self.rule_options
        return None if options is None else find_rule(self.sync_mode)(options, seed=self.seed)

    def with_batches_of(self, ds_config: Mapping[str, object]) -> SwarmConfig:
        """Return the section with ``per_particle`` filled in, if there is one."""
        entries = [entry.filled_in(ds_config) for entry in self.per_particle]
        return self.model_copy(update={"per_particle": entries}) if entries else self

    def has_sync_points(self, num_particles: int) -> bool:
        """Return whether so many particles sync: several by any rule, and one by a rule that acts without peers."""
        rule = self.build_rule()
        return rule is not None and (num_particles > 1 or rule.acts_alone)

    def keys_for_peers(self) -> list[str]:
        """Return the keys that are set to what has a meaning between particles only, such as a ``wire``."""
        fields = type(self).model_fields
        found = [name for name in _OF_AN_EXCHANGE if getattr(self, name) != fields[name].default]
        return [*found, "optimizer_state", *self._moments_key] if self.optimizer_state == "average" else found

    @property
    def _moments_key(self) -> list[str]:
        return ["moments"] if self.moments != ALL_AT_EACH_SYNC else []

    def without_peers(self) -> SwarmConfig:
        """Return the section with the defaults for these keys, for one particle."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].default for name in self.keys_for_peers()})

    def build_schedule(self, ds_config: Mapping[str, object]) -> Schedule:
        """Return the schedule of the sync points."""
        return make_schedule(self.schedule, self.sync_interval // self.turns, self.training_steps(ds_config))

    def training_steps(self, ds_config: Mapping[str, object]) -> int | None:
        """Return the optimizer steps of the training, if known: ``total_steps``, or those of DeepSpeed's scheduler."""
        steps = total_num_steps(ds_config) if self.total_steps is None else self.total_steps
        return steps if isinstance(steps, int) else None

    def resolved(self) -> dict[str, Any]:
        """Return the section with every default filled in, as JSON types."""
        section = self.model_dump(mode="json") | {"schedule": self.schedule.resolved()}
        if self.never_syncs:
            section["sync_interval"] = "never"
        if self.transport == "static":
            del section["elastic"]
        if self.optimizer_state != "average":
            del section["moments"]
        if self.rule_options is not None:
            section[self.sync_mode] = self.rule_options.model_dump(mode="json")
        if self.wire_options is not None:
            section[self.wire] = self.wire_options.model_dump(mode="json")
        return section
