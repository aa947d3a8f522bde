"""What a checkpoint says of the model, so that it can be put together without an engine: see ``consolidate.py``."""

from __future__ import annotations

import copy
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ds_pso.errors import SwarmError
from ds_pso.session.session import Session
from ds_pso.shards import find_shards

MODEL = "model"  # a folder beside DeepSpeed's in that of a particle


def describe_shards(session: Session) -> dict[str, Any] | None:
    """Where each element of this rank's shards belongs, and where the rule keeps the model (``Rule.model_in``).

    None if the shards cannot be read: a lone particle needs nothing of them to train.
    """
    if session.synchronizer is not None:
        shards, model_in = session.synchronizer.parts.shards, session.synchronizer.parts.rule.model_in
    else:
        try:
            shards, model_in = find_shards(session.engine), "x"
        except SwarmError:
            return None
    return {"model_in": model_in, "segments": [astuple(segment) for segment in shards.segments]}


def save_model_config(session: Session, folder: Path) -> None:
    """What a Hugging Face model needs beside its weights, and peft's adapter; for other modules nothing.

    Called on all ranks; the first one of the particle writes.
    """
    module = session.engine.module
    base = module.get_base_model() if hasattr(module, "get_base_model") else module  # of a peft model
    config: Any = getattr(base, "config", None)
    # Other libraries' modules have a save_pretrained, too, or a config of their own kind.
    if session.world.layout.shard_rank != 0 or not (
        hasattr(base, "save_pretrained") and hasattr(config, "to_json_file")
    ):
        return
    adapters = getattr(module, "peft_config", {})
    if adapters and (base is module or list(adapters) != ["default"]):
        return  # several, or without a peft model around: not written anew by ``consolidate.py``
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.architectures = [type(base).__name__]
    config.to_json_file(folder / "config.json")
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.to_json_file(folder / "generation_config.json")
    if adapters:
        adapters["default"].save_pretrained(folder)
