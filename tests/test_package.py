"""What is built and installed: nothing is missing, nothing of the repository spills into site-packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import ds_pso

pytestmark = pytest.mark.slow  # wheel and sdist for all of them

ROOT = Path(__file__).parents[1]
VERSION = ds_pso.__version__
NOT_IN_SDIST = (".ci/", ".git", ".pre-commit")  # of use in a clone only
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Output of a command that must succeed, started in this folder."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """As ``python -m build --no-isolation`` does."""
    return target / run([sys.executable, "-c", BUILD, f"build_{kind}", str(target)], source).splitlines()[-1]


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    return set(run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines())


@pytest.fixture(scope="module")
def sdist(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the clone, so that no build folder and no metadata are left in it."""
    copy = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, which therefore holds what building takes."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"ds_pso-{VERSION}", tmp_path_factory.mktemp("wheel"))


def test_the_sdist_is_the_repository(sdist: Path, tracked: set[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if name.startswith("ds_pso.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == {name for name in tracked if not name.startswith(NOT_IN_SDIST)}


def test_the_wheel_is_the_package(wheel: Path, tracked: set[str]) -> None:
    about = f"ds_pso-{VERSION}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if not name.startswith(about)} == {n for n in tracked if n.startswith("ds_pso/")}
    assert {f"{about}licenses/LICENSE", f"{about}entry_points.txt"} <= names


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own, beside the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    run([*pip, "--target", str(folder), str(wheel)], folder)
    return folder


def test_an_installed_wheel_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import ds_pso\n"
        'with ds_pso.init({"swarm": {"particles": 2}}) as swarm:\n'
        "    print(ds_pso.__file__, swarm.gather(swarm.particle))\n"
    )
    command, here = str(installed / "bin" / "ds-pso"), {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    assert "simulate" in run([command, "--help"], tmp_path, **here)
    said = run([command, "simulate", "script.py"], tmp_path, **here)
    assert said.splitlines()[-2:] == [f"{installed / 'ds_pso/__init__.py'} [0.0, 1.0]"] * 2


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", VERSION, "Apache-2.0")
    assert all({"type", "title", "authors", "year"} <= set(reference) for reference in citation["references"])
