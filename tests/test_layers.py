"""The architecture: each package imports only what lies below it."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ds_pso

PACKAGE = Path(ds_pso.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a package, or a module beside the packages, imports only what stands in a row below its own.
FLOORS: list[set[str]] = [
    {"_version", "errors"},
    {"utils"},
    {"sampler", "rules", "shards", "distributed", "metrics", "search"},
    {"comm", "elastic", "report"},
    {"sync"},
    {"config"},
    {"session"},
    {"checkpoint"},
    {"export", "accelerate"},
    {"swarm"},
    {"simulation", "hf_trainer", "lightning"},
    {"ds_pso"},
    {"training"},
    {"cli", "train"},
]
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}

# What a layer must not know about, of the world outside.
MUST_NOT_KNOW = [
    *[("rules", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
    *[("comm", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("distributed", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("elastic", name) for name in ("deepspeed", "transformers", "accelerate")],
    *[("sync", name) for name in ("torch.distributed", "deepspeed", "transformers", "accelerate")],
    *[("swarm", name) for name in ("torch.distributed", "deepspeed", "transformers", "accelerate")],
    *[("session", name) for name in ("torch.distributed", "transformers", "accelerate")],
    *[("training", name) for name in ("torch.distributed",)],
    *[("report", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
    *[("metrics", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
    *[("search", name) for name in ("torch.distributed", "deepspeed", "accelerate")],
    *[("config", name) for name in ("torch", "deepspeed", "transformers", "accelerate")],
]


def package_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "ds_pso" if first == "__init__" else first


def names_used(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names that are imported at run time, anywhere, and ``torch.distributed`` reached through torch.

    ``at_import``: only those outside of functions.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # for annotations only: no import when it runs
        if at_import and isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield "torch.distributed"
        yield from names_used(node, at_import=at_import)


@functools.cache
def names_in(file: Path, at_import: bool = False) -> list[str]:
    return list(names_used(ast.parse(file.read_text(encoding="utf-8")), at_import=at_import))


def package_named(name: str) -> str | None:
    """The package of ds_pso that an imported name belongs to; None for everything else."""
    top, *rest = name.split(".")
    if top != "ds_pso":
        return None
    return rest[0] if rest and rest[0] in FLOOR_OF else "ds_pso"


def ids(value: object) -> str:
    return value.relative_to(PACKAGE).as_posix() if isinstance(value, Path) else str(value)


def test_every_package_stands_on_one_floor():
    assert {package_of(file) for file in FILES} == set(FLOOR_OF)
    assert len(FLOOR_OF) == sum(map(len, FLOORS))


def test_few_modules_stand_beside_the_packages():
    assert sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "_version")) == [
        *("accelerate", "errors", "lightning", "sampler", "simulation", "swarm", "train")
    ]


@pytest.mark.parametrize("init", sorted(PACKAGE.glob("*/__init__.py")), ids=ids)
def test_every_package_says_what_it_is_for(init):
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    assert text
    assert len(text.splitlines()) <= 5


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_arrows_go_down(file):
    mine = package_of(file)
    used = {package_named(name) for name in names_in(file)} - {None, mine}
    assert not {package for package in used if FLOOR_OF[package] >= FLOOR_OF[mine]}


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_are_absolute(file):
    assert not [name for name in names_in(file) if name.startswith(".")]


def test_modules_of_a_package_are_not_tangled():
    """No module reaches itself through what it imports when it is imported."""
    modules = {".".join(("ds_pso", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}

    def imports(name: str) -> set[str]:
        found = set()
        for used in names_in(modules[name], at_import=True):
            while used and used not in modules:
                used = used.rpartition(".")[0]
            found.add(used)
        return found - {"", name}

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in seen:
            for other in sorted(imports(name)):
                visit(other, (*above, name))
            seen.add(name)

    seen: set[str] = set()
    for name in modules:
        visit(name, ())


@pytest.mark.parametrize(("package", "outsider"), MUST_NOT_KNOW)
def test_a_package_does_not_know_what_is_none_of_its_business(package, outsider):
    for file in FILES:
        if package_of(file) == package:
            assert not [name for name in names_in(file) if f"{name}.".startswith(f"{outsider}.")], file


@pytest.mark.slow
def test_the_script_hides_no_module_of_others():
    """Its folder is the package, whose folders have names such as ``config``."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit(sys.argv[2] in sys.path)"
    command = [sys.executable, "-c", code, str(PACKAGE / "train.py"), str(PACKAGE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PACKAGE.parent)])}
    assert subprocess.run(command, env=environment, check=False).returncode == 0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", ["torch.distributed"]),
        ("from torch import distributed", ["torch.distributed"]),
        ("def f():\n    from ds_pso.swarm import Swarm", ["ds_pso.swarm.Swarm"]),
        ("from ds_pso import export", ["ds_pso.export"]),
        ("import torch\ntorch.distributed.barrier()", ["torch", "torch.distributed"]),
        ("from .base import Rule", [".base.Rule"]),
        ("if TYPE_CHECKING:\n    from ds_pso.swarm import Swarm", []),
    ],
)
def test_imports_are_seen_wherever_they_stand(source, expected):
    assert list(dict.fromkeys(names_used(ast.parse(source)))) == expected
