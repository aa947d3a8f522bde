"""The files of an expert: a Hugging Face model folder, or the adapter that peft has saved. Read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ds_pso.errors import ConfigError

log = logging.getLogger(__name__)

ADAPTER = "adapter_model.safetensors"
_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MOST_NAMES = 4  # that an error shows
_PIECES, _PIECE = 64, 4096  # of a file that its fingerprint looks at
_OF_NO_WEIGHT = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "architectures"}
_OF_AN_ADAPTER = {"base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "use_rslora"}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Expert:
    """An expert on disk. Its files are mapped into memory and stay open.

    Attributes:
        folder: as it was given.
        config: ``config.json``, or ``adapter_config.json``.
        shapes: of all tensors, by their name in the files.
        paths: its safetensors.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Shapes
    paths: tuple[Path, ...]
    _file_of: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Expert:
        """Open a folder.

        Raises:
            ConfigError: it holds no safetensors, or they or the config cannot be read.
        """
        paths = _weight_files(folder)
        config = _read_json(folder / ("adapter_config.json" if paths[0].name == ADAPTER else "config.json"))
        shapes: dict[str, tuple[int, ...]] = {}
        file_of: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, "pt")
                for name in file.keys():  # noqa: SIM118
                    shapes[name], file_of[name] = tuple(file.get_slice(name).get_shape()), file
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path}: cannot be read ({error}); copy the expert again") from error
        return cls(folder, config, shapes, paths, file_of)

    @property
    def is_adapter(self) -> bool:
        """True if it is an adapter of peft's."""
        return self.paths[0].name == ADAPTER

    def tensor(self, name: str) -> Tensor:
        """Read a tensor; its memory is that of the file until it is changed."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """Return a hash of the files' sizes, names, shapes and some of their bytes, in hexadecimal."""
        found = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                for number in range(_PIECES):
                    file.seek(number * max(0, size - _PIECE) // (_PIECES - 1))
                    found.update(file.read(_PIECE))
            found.update(f"{path.name} {size}".encode())
        found.update(repr(sorted(self.shapes.items())).encode())
        return found.hexdigest()[:16]


def open_all(folders: Sequence[Path], base: Path | None) -> tuple[list[Expert], Expert | None]:
    """Open experts and base, and compare them.

    Raises:
        ConfigError: they are no models of one architecture, or no adapters of one base.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} expert: there is nothing to combine; give two or more folders")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("an expert is given twice; give each folder once")
    experts = [Expert.open(folder) for folder in folders]
    first = experts[0]
    opened = None if base is None else Expert.open(base)
    if opened is not None and opened.is_adapter:
        raise ConfigError(f"--base {base}: is an adapter; leave it out, adapters are combined with one another")
    if opened is not None and first.is_adapter:
        raise ConfigError(f"--base {base}: the experts are adapters, and say themselves what they adapt; leave it out")
    for other in [*experts[1:], *filter(None, [opened])]:
        _compare(first, other)
    return experts, opened


def names_of(experts: Sequence[Expert]) -> tuple[str, ...]:
    """Return a name for each: that of its folder, or the whole path where these are not unique."""
    names = tuple(expert.folder.resolve().name for expert in experts)
    return names if len(set(names)) == len(names) else tuple(str(expert.folder) for expert in experts)


def check_shapes(wanted: Shapes, found: Shapes, first: str, other: str) -> None:
    """Compare names and shapes.

    Raises:
        ConfigError: they differ.
    """
    missing = [name for name in wanted if name not in found]
    added = [name for name in found if name not in wanted]
    if missing or added:
        raise ConfigError(
            f"{other}: has other tensors than {first}{_listed('; missing', missing)}{_listed('; added', added)}; "
            "give experts of one architecture"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ConfigError(
                f"{other}: {name} has the shape {list(found[name])}, and {list(shape)} in {first}; give experts of one "
                "architecture and one vocabulary"
            )


def _compare(first: Expert, other: Expert) -> None:
    if first.is_adapter != other.is_adapter:
        raise ConfigError(f"{other.folder}: one of it and {first.folder} is an adapter; merge it into its model first")
    check_shapes(first.shapes, other.shapes, str(first.folder), str(other.folder))
    keys = {key for key in (*first.config, *other.config) if first.config.get(key) != other.config.get(key)}
    if first.is_adapter:
        keys = {key for key in keys & _OF_AN_ADAPTER if not _same_set(first.config.get(key), other.config.get(key))}
    if keys & {"model_type", *_OF_AN_ADAPTER}:
        key = sorted(keys & {"model_type", *_OF_AN_ADAPTER})[0]
        raise ConfigError(
            f"{other.folder}: {key} = {other.config.get(key)!r}, and {first.config.get(key)!r} in {first.folder}; give "
            "experts of one architecture, or adapters of one base"
        )
    unlike = sorted(keys - _OF_NO_WEIGHT)
    if unlike:
        log.warning("%s: its config differs from that of %s in %s", other.folder, first.folder, ", ".join(unlike))


def _same_set(a: object, b: object) -> bool:
    return isinstance(a, list) and isinstance(b, list) and sorted(map(str, a)) == sorted(map(str, b))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    for name in (ADAPTER, _WHOLE):
        if (folder / name).is_file():
            return (folder / name,)
    if (folder / _INDEX).is_file():
        parts = sorted({Path(part).name for part in _read_json(folder / _INDEX).get("weight_map", {}).values()})
        absent = [part for part in parts if not (folder / part).is_file()]
        if parts and not absent:
            return tuple(folder / part for part in parts)
        raise ConfigError(f"{folder}: {_INDEX} names files that are not there{_listed(':', absent)}; copy it again")
    raise ConfigError(
        f"{folder}: holds neither {_WHOLE} nor {ADAPTER}; give a folder that save_pretrained has written (older ones "
        "hold pickles, which are not read: load and save the model once with a recent transformers)"
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give a folder that save_pretrained has written"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no JSON object; give a folder that save_pretrained has written")
    return found


def _listed(before: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{before} {', '.join(names[:_MOST_NAMES])}{more}"
