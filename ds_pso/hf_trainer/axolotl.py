"""A plugin that makes a training by Axolotl a particle of a swarm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from axolotl.integrations.base import BasePlugin

from ds_pso.errors import ConfigError, UnsupportedError
from ds_pso.hf_trainer.callback import SwarmCallback
from ds_pso.swarm import Swarm, init

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


class AxolotlConfig(Protocol):
    """What the plugin reads of Axolotl's config; a key that is not in the YAML is None."""

    deepspeed: str | Mapping[str, Any] | None
    output_dir: str | None
    max_steps: int | None
    warmup_steps: int | None
    sample_packing: bool | None
    is_preprocess: bool | None


class SwarmPlugin(BasePlugin):
    """Makes Axolotl's model a particle: ``plugins: [ds_pso.hf_trainer.axolotl.SwarmPlugin]`` in its YAML.

    The JSON that ``deepspeed:`` names has a ``swarm`` section. What becomes of the Trainer's features is that of
    ``ds_pso.hf_trainer.SwarmCallback``.

    Raises:
        ConfigError: by ``register``, if the YAML names no JSON, or for what ``ds_pso.init`` says.
        UnsupportedError: by ``register``, if samples are packed, or particles of one rank share a machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self._swarm: Swarm | None = None

    def register(self, cfg: AxolotlConfig) -> None:
        """Join the swarm, before Axolotl counts ranks; from here on it reads the JSON without the ``swarm`` section."""
        if cfg.is_preprocess:  # on one rank, and nothing is trained
            return
        _check_supported(cfg)
        config = cfg.deepspeed
        self._swarm = init(
            json.loads(json.dumps(config)) if isinstance(config, Mapping) else config, run_dir=cfg.output_dir
        )
        _check_devices(self._swarm)
        cfg.deepspeed = self._swarm.ds_config

    def add_callbacks_post_trainer(self, cfg: AxolotlConfig, trainer: Trainer) -> list[TrainerCallback]:
        assert self._swarm is not None
        _count_steps(self._swarm.num_particles, cfg, trainer)
        return [SwarmCallback(self._swarm, trainer)]

    def post_train_unload(self, cfg: AxolotlConfig) -> None:
        """Leave the swarm; the model is saved."""
        if self._swarm is not None:
            self._swarm.close()


def _check_supported(cfg: AxolotlConfig) -> None:
    if not cfg.deepspeed:
        raise ConfigError(
            "SwarmPlugin: deepspeed is not set in Axolotl's YAML, and a particle is a DeepSpeed job; give it the path "
            'of a JSON with a "swarm" section'
        )
    if cfg.sample_packing:
        raise UnsupportedError(
            "SwarmPlugin: sample_packing: true in Axolotl's YAML brings a batch sampler of its own, and the swarm "
            "splits the data over its ranks itself; set it to false"
        )


def _check_devices(swarm: Swarm) -> None:
    """Axolotl sets LOCAL_RANK to 0 where it sees one rank: those of a machine would share its first GPU."""
    with swarm.world.coordinator.agree("looking for each rank's device"):
        if swarm.world.layout.particle_size == 1 and os.environ.get("LOCAL_RANK", "0") != "0":
            raise UnsupportedError(
                "SwarmPlugin: particles of one rank each share a machine, and Axolotl would put them all on its first "
                "GPU; give each particle two ranks or more, or a machine of its own"
            )


def _count_steps(particles: int, cfg: AxolotlConfig, trainer: Trainer) -> None:
    """Axolotl counted the steps that one particle would take through all of the data, and warms up by that count."""
    if particles > 1 and not cfg.max_steps:
        trainer.args.max_steps = -1  # the Trainer counts the batches of an epoch, num_epochs times
        if cfg.warmup_steps is None and trainer.args.warmup_steps >= 1:  # below it is a share of the Trainer's count
            trainer.args.warmup_steps //= particles
