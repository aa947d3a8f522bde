"""A swarm and the engine that it trains: how they are joined, and when they meet the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ds_pso.config.schema import total_num_steps
from ds_pso.elastic.world import ElasticWorld
from ds_pso.errors import ConfigError, SwarmError
from ds_pso.metrics import deepspeed_monitor
from ds_pso.rules import Rule
from ds_pso.session.parts import SwarmState
from ds_pso.shards import Shards, find_shards
from ds_pso.sync.assessment import Probe
from ds_pso.sync.elastic import ElasticSynchronizer
from ds_pso.sync.health import Limits, warning
from ds_pso.sync.rollback import Progress
from ds_pso.sync.schedule import Schedule
from ds_pso.sync.synchronizer import Synchronizer
from ds_pso.utils.offload import Offload


class AttachedSwarm(SwarmState):
    """What ``Swarm`` does from step to step."""

    def attach(self, engine: Any, probe: Probe | None = None) -> Any:
        """Let ``engine.step()`` meet the swarm at sync points.

        Copies the weights of particle 0 to all others, so that all start alike.

        Args:
            engine: what ``deepspeed.initialize`` returned, with an optimizer.
            probe: for ``"fitness": "probe"`` and for rules that score what they try: a function of the
                number of the sync point, for choosing a batch, that returns the engine's loss on it.
                The batch must be the same for every particle. Called on all ranks, without gradients;
                the mean over a particle's ranks counts.

        Returns:
            The same engine.

        Raises:
            UnsupportedError: the engine uses a feature that the swarm cannot follow.
            ConfigError: the config asks for a probe and none is given, or for the length of the training.
            SwarmError: the particles hold different models, or attach was called before.
        """
        if self._engine is not None:
            raise SwarmError("swarm.attach was called twice; one swarm trains one engine", agreed=True)
        self._take_filled_in(engine.config)
        rule = self.config.build_rule()
        if rule is not None and self.num_particles > 1:
            if self.config.fitness == "probe" and probe is None:
                raise ConfigError('swarm.fitness = "probe": give swarm.attach a probe, or use "train"')
            if rule.uses_probe and probe is None:
                raise ConfigError(
                    f'swarm.sync_mode = "{self.config.sync_mode}": it scores weights on a probe batch; '
                    "give swarm.attach a probe, or choose another mode or options"
                )
            schedule = self.config.build_schedule(self.ds_config)
            if schedule.last == 0 and self.is_leader:
                warnings.warn(
                    f"swarm.sync_interval = {self.config.sync_interval}: longer than the whole training, so that the "
                    "particles never meet; lower it",
                    stacklevel=2,
                )
            if rule.uses_progress and not schedule.last:
                raise ConfigError(
                    f"swarm.{self.config.sync_mode} changes over training, and scheduler.params.total_num_steps = "
                    f"{total_num_steps(self.ds_config)!r} gives no sync point; give a number of at least "
                    "swarm.sync_interval there or in swarm.total_steps"
                )
            with self.world.agree("attaching the engine"):
                shards = find_shards(engine)
            self.synchronizer = self._build_synchronizer(engine, rule, shards, probe, schedule)
        self._engine = engine
        self._follow(engine)
        if isinstance(self.synchronizer, ElasticSynchronizer) and self.synchronizer.came_late:
            self.metrics.rewind(engine.global_steps)
        self.log("start", **self._start_record())
        return engine

    def _build_synchronizer(
        self, engine: Any, rule: Rule, shards: Shards, probe: Probe | None, schedule: Schedule
    ) -> Synchronizer:
        config = self.config
        options: dict[str, Any] = {
            "probe": probe,
            "rank_by": config.fitness,
            "schedule": schedule,
            "optimizer_state": config.optimizer_state,
            "wire": config.wire,
            "fragments": config.fragments,
            "streaming": config.streaming,
            "offload": Offload(config.state_device, config.state_dtype),
            "limits": Limits(config.quarantine_loss, config.quarantine_norm),
        }
        if not isinstance(self.world, ElasticWorld):
            return Synchronizer(self.world, self.exchange, rule, shards, **options)
        progress = Progress(engine, self.samplers)
        options |= {"window": self.window, "progress": progress, "section": config.resolved()}
        return ElasticSynchronizer(self.world, self.exchange, rule, shards, **options)

    def _take_filled_in(self, config: Any) -> None:
        """Accelerate and the HF Trainer replace each "auto" in a copy, or in what they have read themselves."""
        if not isinstance(config, Mapping):
            return  # a path
        for name in deepspeed_monitor.OWN_FOLDERS if self.num_particles > 1 else ():
            section = config.get(name) or {}
            if section.get("enabled") and f"particle_{self.particle}" not in str(section):
                raise ConfigError(
                    f"{name}: the particles would write into one another's files; give DeepSpeed swarm.ds_config, in "
                    "which each has a folder of its own, and not the file itself"
                )
        self.ds_config = {key: value for key, value in config.items() if key != "swarm"}

    def sync(self) -> None:
        """Meet the other particles now; call it on all ranks, outside of forward and backward.

        ``engine.step`` does it when a sync point is due. This one counts as one more.

        Raises:
            PeerError: a rank did not come in time, or was lost.
        """
        if self.synchronizer is not None:
            self._advance(to_the_end=True)
            self._log_sync(self.synchronizer.sync(self.window, self.engine.global_steps))

    def finish_pending(self) -> None:
        """Apply now what a delayed sync point still has to bring, if one is pending; call it on all ranks."""
        self._advance(to_the_end=True)

    def _advance(self, *, to_the_end: bool = False) -> None:
        """Apply what a delayed sync point has brought, so far as it is due."""
        if self.synchronizer is not None and self.synchronizer.pending is not None:
            record = self.synchronizer.advance(self.window, self.engine.global_steps, to_the_end=to_the_end)
            if record is not None:
                self._log_sync(record)

    def _log_sync(self, record: dict[str, Any]) -> None:
        if self.is_leader and (text := warning(record, self.last_sync or {})):
            warnings.warn(text, stacklevel=2)
        self.last_sync = record
        self.log("sync", **record)
        if self.is_leader and self.engine.monitor.enabled:
            self.engine.monitor.write_events(deepspeed_monitor.events(record, self.engine.global_samples))

    def _meet_if_due(self, step: int) -> None:
        synchronizer = self.synchronizer
        if synchronizer is None:
            return
        synchronizer.step_made()
        self._advance()
        schedule = synchronizer.schedule
        if synchronizer.needs_whole or schedule.is_due(step):
            # After resuming with a shorter interval it may begin before the last one is due.
            self._advance(to_the_end=True)
            waits = self.config.delay == 0 or schedule.in_warmup(step) or schedule.progress(step) == 1
            if waits or synchronizer.needs_whole:
                self.sync()
            else:
                synchronizer.begin(self.window, step, self.config.delay)
        synchronizer.clock.go_on()

    def log(self, event: str, **values: Any) -> None:
        """Append a record to ``metrics.jsonl`` (the leader's; other ranks' are dropped).

        Args:
            event: what kind of record; ds_pso's own are called ``sync``.
            values: what JSON can hold; NaN and infinities become null.
        """
        self.metrics.write(event, self._engine.global_steps if self._engine else 0, values)

    def _follow(self, engine: Any) -> None:
        """Watch the engine from outside: on overflow its optimizer is not even called."""
        backward, step = engine.backward, engine.step

        def backward_and_record(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = backward(loss, *args, **kwargs)
            # The HF Trainer divides by the accumulation steps itself, and says so.
            divided = kwargs.get("scale_wrt_gas") is False
            self.window.add(loss * engine.gradient_accumulation_steps() if divided else loss)
            self._backwards += 1
            for sampler in self.samplers:
                sampler.advance()
            return result

        def step_and_meet(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            result = step(*args, **kwargs)
            if engine.global_steps == before:
                return result  # gradients are still being accumulated
            if self.samplers and self._backwards == 0:
                raise SwarmError(
                    "swarm.sampler counts what was trained on, and saw nothing; "
                    "call engine.backward(loss), not loss.backward()"
                )
            self._backwards = 0
            self.window.steps += 1
            self._meet_if_due(engine.global_steps)
            return result

        engine.backward, engine.step = backward_and_record, step_and_meet
