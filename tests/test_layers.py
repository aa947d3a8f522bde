"""The architecture: each layer imports only what lies below it."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_pso

PACKAGE = Path(ds_pso.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A layer is a module or a folder of ds_pso; it may import itself and these. From the ground up.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "quarantine": set(),
    "fitness": {"quarantine"},
    "metrics": {"_version"},
    "lr_schedule": {"errors"},
    "sampler": {"errors"},
    "rules": set(),
    "files": set(),
    "background": set(),
    "step_clock": set(),
    "chunks": set(),
    "checksums": {"chunks"},
    "letters": {"checksums"},
    "layout": {"errors"},
    "roster": {"errors", "layout"},
    "gloo": set(),
    "stores": {"errors"},
    "world": {"background", "errors", "gloo", "layout", "letters", "roster", "stores"},
    "room": {"errors", "letters"},
    "simulated_world": {"errors", "layout", "letters", "room", "roster", "world"},
    "keeping": set(),
    "wire": {"chunks", "keeping"},
    "collectives": {"checksums", "errors", "world"},
    "exchange": {"checksums", "chunks", "collectives", "wire", "world"},
    "shards": {"chunks", "errors"},
    "schedule": {"rules"},
    "monitor": set(),
    "elasticity": {"rules"},
    "consistency": {"errors", "rules"},
    "config": {"consistency", "elasticity", "errors", "rules", "schedule"},
    "census": {"errors", "exchange", "fitness", "quarantine", "rules", "shards", "world"},
    "fragments": {"shards"},
    "pending": set(),
    "updater": {"chunks", "errors", "exchange", "fragments", "keeping", "rules", "shards", "wire"},
    "consensus": {"census", "errors", "exchange", "shards", "updater"},
    "meetings": {
        *("census", "consensus", "errors", "exchange", "fitness", "fragments", "keeping", "pending"),
        *("quarantine", "rules", "schedule", "shards", "step_clock", "updater", "wire", "world"),
    },
    "late": {"errors", "exchange", "fitness", "fragments", "meetings", "pending", "rules", "shards"},
    "synchronizer": {"exchange", "fitness", "late", "letters", "meetings", "pending", "rules", "shards"},
    "elastic": {
        *("consensus", "elasticity", "errors", "exchange", "fitness", "gloo", "layout", "letters", "pending", "rules"),
        *("preemption", "sampler", "shards", "stores", "synchronizer", "updater", "world"),
    },
    "preemption": {"errors", "roster"},
    "disk": {"background", "errors", "files", "roster", "shards"},
    "state": {
        *("config", "disk", "errors", "exchange", "fitness", "meetings", "metrics", "preemption"),
        *("sampler", "synchronizer", "world"),
    },
    "blueprint": {"errors", "shards", "state"},
    "checkpoint": {"blueprint", "disk", "errors", "fragments", "roster", "shards", "state"},
    "export": {"errors", "files", "shards", "state"},
}
MAY_IMPORT["attached"] = {
    *("census", "consistency", "elastic", "errors", "keeping", "monitor", "quarantine", "rules", "schedule", "shards"),
    *("state", "synchronizer"),
}
MAY_IMPORT["swarm"] = set(MAY_IMPORT) - {"_version"}
MAY_IMPORT["hf_trainer"] = {"checkpoint", "errors", "monitor", "swarm"}
MAY_IMPORT["simulate"] = {"config", "errors", "simulated_world", "swarm"}
MAY_IMPORT["plan"] = {"config", "rules", "schedule"}
MAY_IMPORT["skeleton"] = {"errors"}
MAY_IMPORT["consolidate"] = {
    *("blueprint", "disk", "errors", "exchange", "export", "quarantine", "rules", "shards", "skeleton"),
}
MAY_IMPORT["report"] = {"_version", "errors", "files", "metrics"}
MAY_IMPORT["commands"] = {
    *("config", "consistency", "consolidate", "elastic", "errors", "plan", "report", "rules", "simulate", "skeleton"),
    "training",
}
MAY_IMPORT["cli"] = {"commands", "errors"}
MAY_IMPORT["ds_pso"] = {"_version", "errors", "preemption", "simulate", "swarm"}
MAY_IMPORT["training"] = {"ds_pso", "config", "elastic", "errors", "files", "metrics", "report", "swarm"}
MAY_IMPORT["train"] = {"training"}

# What a layer must not know about, of the world outside.
MUST_NOT_KNOW = [
    *[("rules", name) for name in ("torch.distributed", "deepspeed", "transformers", "accelerate")],
    *[("exchange", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("world", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("elastic", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("synchronizer", name) for name in ("torch.distributed", "deepspeed", "transformers", "accelerate")],
    *[
        (layer, name)
        for layer in ("swarm", "attached")
        for name in ("torch.distributed", "deepspeed", "transformers", "accelerate")
    ],
    *[("training", name) for name in ("torch.distributed",)],
    *[("report", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
    *[("config", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
]


def layer_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "ds_pso" if first == "__init__" else first


def names_used(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported at run time, anywhere, and ``torch.distributed`` reached through torch."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # for annotations only: no import when it runs
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield "torch.distributed"
        yield from names_used(node)


@functools.cache
def names_in(file: Path) -> list[str]:
    return list(names_used(ast.parse(file.read_text(encoding="utf-8"))))


def layer_named(name: str) -> str | None:
    """The layer of ds_pso that an imported name belongs to; None for everything else."""
    top, *rest = name.split(".")
    if top != "ds_pso":
        return None
    return rest[0] if rest and rest[0] in MAY_IMPORT else "ds_pso"


def ids(value: object) -> str:
    return value.relative_to(PACKAGE).as_posix() if isinstance(value, Path) else str(value)


def test_every_module_has_its_place():
    assert {layer_of(file) for file in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_a_module_imports_only_from_layers_below(file):
    layer = layer_of(file)
    used = {layer_named(name) for name in names_in(file)} - {None, layer}
    assert used <= MAY_IMPORT[layer]


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_are_absolute(file):
    assert not [name for name in names_in(file) if name.startswith(".")]


def test_layers_are_not_tangled():
    """No layer can reach itself through those that it may import."""

    def reached(layer: str) -> set[str]:
        return MAY_IMPORT[layer].union(*(reached(below) for below in MAY_IMPORT[layer]))

    assert not [layer for layer in MAY_IMPORT if layer in reached(layer)]


@pytest.mark.parametrize(("layer", "outsider"), MUST_NOT_KNOW)
def test_a_layer_does_not_know_what_is_none_of_its_business(layer, outsider):
    for file in FILES:
        if layer_of(file) == layer:
            assert not [name for name in names_in(file) if f"{name}.".startswith(f"{outsider}.")], file


def test_no_module_shadows_one_that_others_import():
    """``python ds_pso/train.py`` puts the package's folder first on the path of everybody's imports."""
    mine = {layer_of(file) for file in FILES} - {"ds_pso"}
    assert not mine & set(sys.stdlib_module_names)
    installed = {name for name, owners in importlib.metadata.packages_distributions().items() if "ds_pso" not in owners}
    assert not mine & installed


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", ["torch.distributed"]),
        ("from torch import distributed", ["torch.distributed"]),
        ("def f():\n    from ds_pso.swarm import Swarm", ["ds_pso.swarm.Swarm"]),
        ("from ds_pso import export", ["ds_pso.export.live"]),
        ("import torch\ntorch.distributed.barrier()", ["torch", "torch.distributed"]),
        ("from .base import Rule", [".base.Rule"]),
        ("if TYPE_CHECKING:\n    from ds_pso.swarm import Swarm", []),
    ],
)
def test_imports_are_seen_wherever_they_stand(source, expected):
    assert list(dict.fromkeys(names_used(ast.parse(source)))) == expected
