"""One model from a checkpoint on disk, in one process: no launcher, no engine, no GPU.

Each rank's record says where the elements of its shards belong, so all ZeRO stages read alike. (DeepSpeed's
zero_to_fp32 knows neither stage 0, nor BF16_Optimizer, nor frozen parameters at stage 1, nor the state of a rule.)
Files are mapped into memory and read parameter by parameter: beside the model in its working dtype there are a few
copies of one parameter in fp32.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ds_pso.checkpoint.format import LATEST, find, is_of_trainer, particle_folders, verified_record, weights_only
from ds_pso.checkpoint.reader import Flat, SavedParticle
from ds_pso.comm.exchange import wire_dtype
from ds_pso.errors import CheckpointError, ConfigError, UnsupportedError
from ds_pso.export import contents
from ds_pso.export.meta_model import load_model_config, skeleton, with_adapter
from ds_pso.rules import SyncPoint
from ds_pso.shards import Segment
from ds_pso.shards.base import square_of_norm
from ds_pso.shards.untrained import digest, is_averaged, look_at
from ds_pso.sync.fitness import ParticleReport
from ds_pso.sync.health import Limits, judge
from ds_pso.utils.model_folder import replacing_model
from ds_pso.utils.wrappers import without_wrapper_parts


@dataclass(frozen=True)
class Model:
    """A model that was put together from a checkpoint."""

    state_dict: dict[str, Tensor]  # in the working dtype
    tied: dict[str, str]  # names that are not in it, and under which the same tensor is
    trained: frozenset[str]  # names of the parameters that are; none at ZeRO 0, where frozen ones may be among them
    config: Path  # folder of the Hugging Face config, if there is one
    particles: tuple[int, ...]  # that are in it
    step: int

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.state_dict.values())


def find_checkpoint(run: Path, tag: str | None = None) -> Path:
    """Return the step_* folder that ``run`` is, or the one in it that ``tag`` or ``latest`` names.

    Args:
        run: a run folder with a folder ``checkpoints``, a checkpoints folder, or a step_* folder. Or the HF Trainer's
            output_dir, or a checkpoint-* folder of a particle in there.

    Raises:
        CheckpointError: there is none.
    """
    if is_of_trainer(run) or any(run.glob("particle_*/checkpoint-*")) or any(run.glob("checkpoint-*")):
        return _find_of_trainer(run, tag)
    if tag is None and re.fullmatch(r"step_\d{8,}", run.resolve().name) and run.is_dir():
        return run
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if tag is None and not (folder / LATEST).is_file():
        raise CheckpointError(
            f"{run}: no checkpoint to export; give a run folder, its checkpoints folder, or a step_* folder"
        )
    return find(folder, tag)


def _find_of_trainer(run: Path, tag: str | None) -> Path:
    """Return the checkpoint-* folder of the lowest particle: of the newest step that all particles have."""
    if is_of_trainer(run):
        outputs, tag = run.resolve().parents[1], run.resolve().name
    else:
        outputs = run.resolve().parent if any(run.glob("checkpoint-*")) else run
    particles = sorted(outputs.glob("particle_*"))
    names = [
        {path.name for path in particle.glob("checkpoint-*") if (path / "swarm").is_dir()} for particle in particles
    ]
    steps = sorted(set.intersection(*names) if names else (), key=lambda name: int(name.rpartition("-")[2]))
    if not steps or (tag is not None and tag not in steps):
        raise CheckpointError(
            f"{run}: no {tag or 'checkpoint'} of a swarm to export; give the output_dir of a Trainer with "
            "SwarmCallback, in which every particle_* folder has the same checkpoint-*; what a Trainer of one "
            "particle, or without it, has saved opens with from_pretrained"
        )
    return particles[0] / (tag or steps[-1])


def consolidate(source: Path, which: Literal["consensus", "best"] | int = "consensus") -> Model:
    """Return the model that ``swarm.export`` would have written when the checkpoint ``source`` was saved.

    Args:
        which: as for ``swarm.export``, or the number of a particle.

    Raises:
        CheckpointError: missing, damaged, of another format; or no weights are finite.
        UnsupportedError: saved under tensor parallelism.
        ConfigError: no such particle.
    """
    first = verified_record(particle_folders(source, 0).part, 0)
    P, S = first["num_particles"], first["particle_size"]
    if first["tensor_parallel"] > 1:
        raise UnsupportedError(
            f"export: {source}: saved by ranks that had a part of each layer (tensor_parallel.autotp_size), which only "
            "the layers themselves can put together; resume it on as many ranks, and call swarm.export"
        )
    if isinstance(which, int) and not 0 <= which < P:
        raise ConfigError(f"--particle {which}: {source} has particles 0 to {P - 1}")
    with weights_only():
        particles = [None if which not in ("consensus", "best", p) else _Particle.open(source, p, S) for p in range(P)]
        weights = _weights(source, particles, which)
        chosen = [(w, particle) for w, particle in zip(weights, particles, strict=True) if particle is not None and w]
        state_dict, tied = _combine(chosen, of_rule=which == "consensus")
        leader = chosen[0][1].saved
        trained = frozenset(leader.pieces if leader.stage > 0 else ())
    members = tuple(p for p, weight in enumerate(weights) if weight)
    return Model(state_dict, tied, trained, particle_folders(source, members[0]).config, members, int(first["step"]))


def write(model: Model, folder: Path) -> str | None:
    """Write it as ``swarm.export`` does. Return why it is not a whole Hugging Face model; None if it is.

    Raises:
        UnsupportedError: what would be written is not what ``from_pretrained`` looks for; the folder stays as it was.
    """
    with replacing_model(folder) as temporary:
        module, reason = _module_of(model)
        if module is not None:
            tensors, trained = _in_names_of(module, model)
            try:
                contents.check_tensors(tensors, trained, module)
            except UnsupportedError:
                named = _config_of(model).architectures or []
                if contents.is_peft(module) or type(module).__name__ in named:
                    raise
                reason = f"its class is not one of transformers', and {type(module).__name__} has other parameters"
            else:
                shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                module.save_pretrained(temporary, state_dict=tensors)
                contents.check_files(temporary, shapes, trained, module)
                return None
        whole = model.state_dict | {name: model.state_dict[source].clone() for name, source in model.tied.items()}
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, temporary / "model.safetensors")
        for path in sorted(model.config.glob("*config.json")):
            shutil.copy(path, temporary)
    return reason


def _in_names_of(module: PreTrainedModel, model: Model) -> tuple[dict[str, Tensor], Collection[str]]:
    """Return all tensors that the module has, and the names of those that are trained."""
    tensors, trained, known = dict(model.state_dict), model.trained, module.state_dict().keys()
    if all(name.startswith(_DATA_PARALLEL) and name not in known for name in tensors):
        tensors = {name.removeprefix(_DATA_PARALLEL): tensor for name, tensor in tensors.items()}
        trained = frozenset(name.removeprefix(_DATA_PARALLEL) for name in trained)
    contents.untied(tensors, model.tied, module)
    return tensors, trained


_DATA_PARALLEL = "module."


def _config_of(model: Model) -> PreTrainedConfig:
    """Return the config of the whole model; the Trainer saves none of that which adapters are for."""
    if (model.config / "config.json").is_file():
        return load_model_config(model.config)
    base = json.loads((model.config / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    return load_model_config(base or model.config)


def _module_of(model: Model) -> tuple[PreTrainedModel | None, str | None]:
    """Return the module to which the tensors belong, without memory; or the reason why there is none."""
    adapter = model.config / "adapter_config.json"
    if not adapter.is_file() and not (model.config / "config.json").is_file():
        return None, "the module that was trained has no Hugging Face config"
    dtype = next((t.dtype for t in model.state_dict.values() if t.is_floating_point()), torch.float32)
    try:
        module = skeleton(_config_of(model), dtype)
    except ConfigError:
        if not (model.config / "config.json").is_file():
            return None, "the base model of its adapter is not found; the adapter's config is copied"
        return None, "its class is not one of transformers'; its config.json is copied"
    if adapter.is_file():
        try:
            module = with_adapter(module, model.config)
        except ImportError:
            return None, "peft is not installed; the configs are copied"
        if any(config.is_prompt_learning for config in module.peft_config.values()):
            raise UnsupportedError(
                f"export: {model.config}: peft takes prompts from a model that computes, not from a file; load the "
                "checkpoint with swarm.load, and save the model inside swarm.consensus()"
            )
    if (model.config / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(model.config)
    return module, None


def _weights(source: Path, particles: Sequence[_Particle | None], which: str | int) -> tuple[float, ...]:
    """Return the weight of each particle in the model; they sum to one."""
    there = {i: particle for i, particle in enumerate(particles) if particle is not None}
    limits = Limits(norm=next(iter(there.values())).norm_limit)
    reasons = judge([particle.report() for particle in there.values()], limits)
    left_out = {i for number, i in enumerate(there) if number in reasons}
    alive = tuple(i in there and i not in left_out for i in range(len(particles)))
    if not any(alive):
        who = "no particle has" if isinstance(which, str) else f"particle {which} has no"
        raise CheckpointError(
            f"{source}: {who} finite weights, so there is no model; name an older checkpoint with --tag"
        )
    fitness = tuple(math.nan if particle is None else particle.loss for particle in particles)
    point = SyncPoint(0, fitness, alive)
    return point.best_weights() if which == "best" else point.mean_weights()


def _combine(chosen: Sequence[tuple[float, _Particle]], of_rule: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weighted mean, and the names that are tied with the names that they are tied to.

    Integers, and parameters that are not trained, come from the first particle.
    """
    leader = chosen[0][1]
    frozen, tied = leader.saved.frozen_and_tied([without_wrapper_parts(name) for name in leader.buffers])
    state_dict = dict(frozen)
    for name in leader.saved.pieces:
        like = leader.saved.module[name]
        mean = _mean([(weight, particle.parameter(name, of_rule)) for weight, particle in chosen])
        state_dict[name] = mean.to(like.dtype).view(leader.saved.shape(name))
    for name in leader.buffers:
        buffer = leader.buffer(name)
        parts = [particle.buffer(name) for _, particle in chosen]
        if is_averaged(buffer) and len({digest(part) for part in parts}) > 1:
            wide = wire_dtype(buffer)
            buffer = _mean([(w, part.to(wide)) for (w, _), part in zip(chosen, parts, strict=True)]).to(buffer.dtype)
        state_dict[without_wrapper_parts(name)] = buffer
    return state_dict, tied


def _mean(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """sum_i w_i x_i, in the order of particles; the tensors are used up."""
    mean = parts[0][1].mul_(parts[0][0])
    for weight, x in parts[1:]:
        mean.add_(x.mul_(weight))
    return mean


@dataclass(frozen=True)
class _Particle:
    """A particle of the checkpoint, whose files are checked and mapped into memory.

    Attributes:
        masters: by rank and shard.
        loss: at the last sync point; NaN if there was none.
        norm_limit: above it a particle is left out; None: there is no limit.
        model_in: where the rule keeps the model, see ``Rule.model_in``.
        odd_by_design: how many values in its buffers were not finite when it began; None: not known.
    """

    saved: SavedParticle
    masters: list[list[Tensor]]
    loss: float
    norm_limit: float | None
    model_in: str
    odd_by_design: int | None

    @classmethod
    def open(cls, source: Path, number: int, size: int) -> _Particle:
        """Read the records of its ranks, and check the files that they name.

        Raises:
            CheckpointError: missing or damaged, or does not say where parameters lie.
        """
        part = particle_folders(source, number).part
        records = [verified_record(part, rank) for rank in range(number * size, (number + 1) * size)]
        shards, synced = records[0].get("shards"), records[0]["synchronizer"]
        if shards is None or any(record.get("shards") is None for record in records):
            raise CheckpointError(
                f"{source}: does not say where the parameters of its engine lie (an older ds_pso, or an engine whose "
                "shards cannot be read); load it and use swarm.export"
            )
        saved = SavedParticle.open(source, number, records)
        if saved.trains_other_weights:
            raise CheckpointError(
                f"{source}: saved while a schedule-free optimizer trained, so that its weights are not those to "
                "evaluate; load it and use swarm.export, or below ZeRO 3 call optimizer.eval() before swarm.save"
            )
        loss = math.nan if synced is None else float(synced["last_losses"][number])
        limit = None if synced is None else synced.get("norm_limit")
        states = [record["synchronizer"] for record in records]
        odd = sum(state["odd_by_design"] for state in states if state is not None) if all(states) else None
        return cls(saved, saved.masters(), loss, limit, shards["model_in"], odd)

    def parameter(self, name: str, of_rule: bool = False) -> Tensor:
        """Return a parameter, fp32 and flat.

        Args:
            of_rule: from where the rule keeps the model, which may be its state.
        """

        def read(rank: int, shard: int) -> Flat:
            if of_rule and self.model_in != "x":
                return self.saved.own[rank].get_slice(f"rule.{shard}.{self.model_in}")
            return self.masters[rank][shard]

        numel = self.saved.numel(name)
        return self.saved.gather([Segment(name, 0, 0, 0, numel)], [numel], torch.float32, read)[0]

    @property
    def buffers(self) -> list[str]:
        """Names of its persistent buffers."""
        return [key.removeprefix("buffer.") for key in self.saved.own[0].keys() if key.startswith("buffer.")]  # noqa: SIM118

    def buffer(self, name: str, rank: int = 0) -> Tensor:
        """Return a buffer as it is on a rank."""
        return self.saved.own[rank].get_tensor(f"buffer.{name}")

    def report(self) -> ParticleReport:
        """Report as the particle itself did, of all weights, without padding, and of the buffers of all ranks."""
        norm = math.sqrt(sum(square_of_norm(self.parameter(name)) for name in self.saved.pieces))
        square_norm, odd = look_at(
            [self.buffer(name, rank) for name in self.buffers for rank in range(self.saved.size)]
        )
        more = 0 if self.odd_by_design is None else max(0, odd - self.odd_by_design)
        return ParticleReport(self.loss, 0, norm, math.nan, buffers_norm=math.sqrt(square_norm), odd_buffer_values=more)
