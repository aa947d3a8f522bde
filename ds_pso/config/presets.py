"""Presets: names for ``sync_mode`` that stand for a rule and other defaults of the section. A preset is a line here."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from ds_pso.rules import RULES

ALLREDUCE = "allreduce"

Section = MutableMapping[str, object]  # ``swarm``, as it was read: nothing in it has been checked yet


@dataclass(frozen=True)
class Preset:
    """A rule, and defaults for keys that the section leaves open.

    Attributes:
        rule: JSON name of the rule.
        fill_in: sets keys that are not in the section.
    """

    rule: str
    fill_in: Callable[[Section], object]


def _delayed(section: Section) -> None:
    """Make a sync point late, in fragments, and its interval adaptive, all of it following from the delay."""
    delay = section.setdefault("delay", 4)
    if isinstance(delay, int) and not isinstance(delay, bool) and delay >= 0:  # validation refuses everything else
        section.setdefault("fragments", max(1, min(4, delay)))
        section.setdefault("sync_interval", max(8, 2 * delay))
        section.setdefault("schedule", {"type": "adaptive", "min_interval": max(1, delay)})


PRESETS: dict[str, Preset] = {
    "delayed": Preset("local_sgd", _delayed),
}


def apply_preset(section: Section) -> None:
    """Replace a preset in ``sync_mode`` by its rule and its defaults."""
    preset = PRESETS.get(str(section.get("sync_mode")))
    if preset is not None:
        section["sync_mode"] = preset.rule
        preset.fill_in(section)


def rule_of(mode: str) -> str:
    """Return the name of the rule that a ``sync_mode``, or a subsection of that name, is about."""
    return PRESETS[mode].rule if mode in PRESETS else mode


def sync_modes() -> list[str]:
    """Return every name that ``sync_mode`` may have, each rule followed by its presets."""
    modes = [ALLREDUCE]
    for rule in RULES:
        modes += [rule, *(name for name, preset in PRESETS.items() if preset.rule == rule)]
    return modes
