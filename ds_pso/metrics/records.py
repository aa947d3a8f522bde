"""The lines of ``metrics.jsonl``: what each holds, and how it is read. That of a sync is what callbacks get, too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BeforeValidator, Field, GetPydanticSchema, TypeAdapter, ValidationError

_OPTIONAL = (
    *("left_out", "restored", "repeated", "lr_factors", "fragments_staleness", "fragments_s", "same_samples"),
    *("expert_load_distances", "moments"),
)
_UNSET = ("present", "recovered", "fragment", "abandoned")
# A report is made of these: they must be what they are said to be. A rule's note may have the name of another field.
_IN_REPORTS = {
    *("losses", "alive", "left_out", "drift", "seconds", "waited_s", "exchange_s", "overlapped_s"),
    *("bytes_received", "bandwidth_mbit_s"),
}


def _read_as(kind: object) -> GetPydanticSchema:
    """JSON has lists and objects; in Python any sequence and mapping will do."""
    return GetPydanticSchema(lambda _, schema_of: schema_of(kind))


Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]  # null: NaN or infinite
Numbers = Annotated[Sequence[float], _read_as(list[Number])]
Integers = Annotated[Sequence[int], _read_as(list[int])]
Flags = Annotated[Sequence[bool], _read_as(list[bool])]
Names = Annotated[Sequence[str], _read_as(list[str])]
Texts = Annotated[Mapping[str, str], _read_as(dict[str, str])]
Section = Annotated[Mapping[str, object], _read_as(dict[str, object])]
Groups = Annotated[Sequence[Sequence[int]], _read_as(list[list[int]])]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class SyncRecord:
    """One sync. Sequences have an entry for each particle unless said otherwise; seconds and bytes are this rank's.

    Attributes:
        sync: how many syncs came before.
        losses: fitness; NaN where none is known.
        alive: false: left out.
        left_out: why, by the particle's number.
        restored: what was given back to a particle that had lost it, by the particle's number.
        drift: how far the particles were from what they received: root mean square, relative to its norm.
        staleness: optimizer steps from the beginning of the sync to its end; 0 where training waited.
        next_interval: optimizer steps from this sync to the next.
        seconds: for which training stood still, waiting included.
        waited_s: until the last peer had come.
        exchange_s: inside collectives.
        overlapped_s: beside training.
        step_s: of an optimizer step of the slowest particle since the last sync.
        bytes_received: by this rank.
        bandwidth_mbit_s: of these bytes in ``exchange_s``.
        repeated: collectives that were damaged on the way.
        lr_factors: what learning rates are multiplied by, if the rule says so.
        present: particles that took part, in an elastic swarm.
        recovered: of these, those that took over the state of another.
        fragment: whose turn it was, when streaming.
        abandoned: whether it came to nothing, and the whole model is synced next.
        fragments_staleness: of each fragment.
        fragments_s: seconds after the beginning at which each fragment had come.
        same_samples: groups of particles that have begun to train on the same samples.
        expert_load_distances: how far the shares of tokens that each particle's routers give to the experts are from
            the mean of all particles, if they are counted: total variation, 0 to 1.
        moments: kinds of the optimizer's moments that became their mean, ``first`` and ``second``.
        note: what the rule noted, such as ``weights`` or ``best``.
    """

    sync: int
    losses: Numbers
    alive: Flags
    left_out: Texts = field(default_factory=dict)
    restored: Texts = field(default_factory=dict)
    drift: Number = math.nan
    staleness: int = 0
    next_interval: int = 0
    seconds: Number = 0.0
    waited_s: Number = 0.0
    exchange_s: Number = 0.0
    overlapped_s: Number = 0.0
    step_s: Number = math.nan
    bytes_received: Count = 0
    bandwidth_mbit_s: Number = math.nan
    repeated: int = 0
    lr_factors: Numbers = ()
    present: Integers | None = None
    recovered: Integers | None = None
    fragment: int | None = None
    abandoned: bool | None = None
    fragments_staleness: Integers = ()
    fragments_s: Numbers = ()
    same_samples: Groups = ()
    expert_load_distances: Numbers = ()
    moments: Names = ()
    note: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> object:
        """Return a value by its name in ``metrics.jsonl``, those of the rule's note included."""
        return self.to_json()[name]

    def get(self, name: str, default: object = None) -> object:
        """Return a value by its name, or ``default`` where it has no meaning."""
        return self.to_json().get(name, default)

    def to_json(self) -> dict[str, object]:
        """Return it flat, without what has no meaning here; NaN stays NaN. What was measured goes before a note."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "note"}
        unset = {name for name in _OPTIONAL if not values[name]} | {name for name in _UNSET if values[name] is None}
        return dict(self.note) | {name: value for name, value in values.items() if name not in unset}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> SyncRecord:
        """Return the record that ``to_json``, or that of an older version, has made these values of.

        Raises:
            ValidationError: there are no losses, or a value that reports show has a wrong type.
        """
        values = dict(values)
        if "healed" in values:
            values.setdefault("recovered", values.pop("healed"))
        found = {item.name: values[item.name] for item in fields(cls) if item.name in values and item.name != "note"}
        least = {"sync": 0, "alive": ()}  # of what older versions may have left out
        try:
            record = _SYNC.validate_python(least | found)
        except ValidationError as error:
            odd = {str(item["loc"][0]) for item in error.errors()} - _IN_REPORTS
            found = {name: value for name, value in found.items() if name not in odd}
            record = _SYNC.validate_python(least | found)
        return replace(record, note={name: value for name, value in values.items() if name not in found})


@dataclass(frozen=True)
class StartRecord:
    """The run, as it is when an engine is attached; a resumed run has one more.

    Attributes:
        description: of the swarm, in a line.
        ranks: of each particle.
        backend: between particles; ``simulated`` in one process.
        sync_points: whether there are any; several particles always have some.
        total_steps: of the whole training, if known.
        parameters: trained ones.
        swarm: the section of the config, with its defaults.
        versions: of the libraries that a run depends on most.
    """

    description: str
    particles: int
    ranks: int
    backend: str = ""
    sync_points: bool = False
    total_steps: int | None = None
    zero_stage: int | None = None
    parameters: int | None = None
    swarm: Section = field(default_factory=dict)
    versions: Texts = field(default_factory=dict)


@dataclass(frozen=True)
class LossRecord:
    """The loss of each particle in training, on held-out data, or of the exported model; NaN where none is known."""

    losses: Numbers


Record = TypeVar("Record", covariant=True)


@dataclass(frozen=True)
class Entry(Generic[Record]):
    """A line of ``metrics.jsonl``: what was recorded, and when.

    Attributes:
        event: ``start``, ``sync``, ``train``, ``held_out``, ``exported``, or a name that a script has chosen.
        step: optimizer steps so far.
        time_s: since the log was opened.
    """

    event: str
    step: Count
    time_s: Annotated[float, Field(allow_inf_nan=False)]
    record: Record


_OBJECT = TypeAdapter(dict[str, object])
_ENTRY = TypeAdapter(Entry[object])
_SYNC = TypeAdapter(SyncRecord)
_START = TypeAdapter(StartRecord)
_LOSSES = TypeAdapter(LossRecord)


def entry_from_json(line: object) -> Entry[object]:
    """Check a line that ``read_metrics`` has returned; the record of an event that a script has named is a mapping.

    Raises:
        ValidationError: it is no JSON object, or an event that ds_pso logs has not the values it should.
    """
    return plain_sync(line) or _checked(line)


def _checked(line: object) -> Entry[object]:
    values = _OBJECT.validate_python(line)
    entry = _ENTRY.validate_python(values | {"record": None})
    values = {name: value for name, value in values.items() if name not in ("event", "step", "time_s")}
    return replace(entry, record=_record(entry.event, values))


LARGEST = 1e100  # of a real number that a report can draw
MOST = 10**18  # of a whole one


def tame(value: object) -> tuple[object, bool]:
    """Replace numbers that are too large to be drawn by None; returns also whether there were any."""
    if isinstance(value, int | float):
        fits = abs(value) <= (MOST if isinstance(value, int) else LARGEST) or value != value
        return (value, False) if fits else (None, True)
    if isinstance(value, dict):
        items = {key: tame(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(odd for _, odd in items.values())
    if isinstance(value, list):
        found = [tame(item) for item in value]
        return [item for item, _ in found], any(odd for _, odd in found)
    return value, False


def _are_usual(values: Sequence[object]) -> bool:
    """Return true if they are no containers, and no number among them is too large."""
    for value in values:
        kind = type(value)
        if kind is float:
            if not abs(value) <= LARGEST:  # type: ignore[arg-type]
                return False
        elif kind is int:
            if not abs(value) <= MOST:  # type: ignore[arg-type]
                return False
        elif kind is dict or kind is list:
            return False
    return True


# Fields of a sync by what they hold, for reading the usual line without pydantic, which takes five times as long.
_PLAIN_REALS = frozenset(
    ("drift", "seconds", "waited_s", "exchange_s", "overlapped_s", "step_s", "bandwidth_mbit_s"),
)
_PLAIN_COUNTS = frozenset(("sync", "staleness", "next_interval", "bytes_received", "repeated", "fragment"))
_REALS: frozenset[type] = frozenset((float, int, NoneType))
_INTEGERS: frozenset[type] = frozenset((int,))
_PLAIN_LISTS: dict[str, frozenset[type]] = {
    "losses": _REALS,
    "lr_factors": _REALS,
    "fragments_s": _REALS,
    "expert_load_distances": _REALS,
    "present": _INTEGERS,
    "recovered": _INTEGERS,
    "fragments_staleness": _INTEGERS,
    "alive": frozenset((bool,)),
}
_DEFAULTS = {name: value for name, value in vars(SyncRecord(0, (), ())).items() if name not in ("left_out", "note")}


def plain_sync(line: object) -> Entry[object] | None:
    """Return the entry of a sync whose values are the usual ones, as pydantic would; None: let that decide."""
    if not isinstance(line, dict) or line.get("event") != "sync" or "losses" not in line or "healed" in line:
        return None
    step, time_s = line.get("step"), line.get("time_s")
    if type(step) is not int or not 0 <= step <= MOST or type(time_s) is not float or not abs(time_s) <= LARGEST:
        return None
    found: dict[str, object] = {**_DEFAULTS, "left_out": {}}
    note: dict[str, object] = {}
    for name, value in line.items():
        kind = type(value)
        if name in _PLAIN_REALS:
            if value is not None and (kind is not float or not abs(value) <= LARGEST):
                return None
            found[name] = math.nan if value is None else value
        elif name in _PLAIN_COUNTS:
            if kind is not int or not 0 <= value <= MOST:
                return None
            found[name] = value
        elif name in _PLAIN_LISTS:
            if kind is not list or not _PLAIN_LISTS[name].issuperset(map(type, value)) or not _are_usual(value):
                return None
            reals = _PLAIN_LISTS[name] is _REALS
            found[name] = [math.nan if item is None else float(item) for item in value] if reals else value
        elif name == "left_out":
            if kind is not dict or not all(type(reason) is str for reason in value.values()):
                return None
            found[name] = value
        elif name == "abandoned":
            if kind is not bool:
                return None
            found[name] = value
        elif name == "note":
            return None
        elif name not in ("event", "step", "time_s"):
            if not _are_usual(value if kind is list else [value]):
                return None
            note[name] = value
    found["note"] = note
    record = object.__new__(SyncRecord)
    vars(record).update(found)  # what the constructor of a frozen class does, one by one
    return Entry("sync", step, time_s, record)


def _record(event: str, values: dict[str, object]) -> object:
    if event == "sync":
        return SyncRecord.from_json(values)
    if event == "start":
        return _START.validate_python(values)
    try:
        return _LOSSES.validate_python(values)
    except ValidationError:
        return values  # a script may log what it likes
