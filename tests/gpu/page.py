"""What was found, as lines for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpu.ranks import Outcome
from gpu.table import OUT_OF_REACH, Check

Row = tuple[Check, Outcome]


def line(check: Check, outcome: Outcome) -> str:
    """Return a line for a terminal."""
    return f"{outcome.state:9} {outcome.seconds:5.0f} s  {check.name:20} {outcome.found}"


def summary(rows: Sequence[Row]) -> str:
    """Return how many ended how."""
    states = [outcome.state for _, outcome in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in ("ok", "failed", "not tried"))


def markdown(rows: Sequence[Row], machine: Mapping[str, str]) -> str:
    """Return the page: the machine, a table, what was out of reach, and the details of what failed.

    Args:
        machine: what it ran on, by name.
    """
    lines = [
        "# GPU check",
        "",
        f"Made by `python tests/gpu_check.py` on {', '.join(f'{name} {value}' for name, value in machine.items())}: "
        f"{summary(rows)}. Processes of a check share one GPU; particles of one rank have NCCL inside, and their peers "
        "are over gloo.",
        "",
        "| | check | | s | found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for check, outcome in rows:
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else ""
        cells = (f"`{check.name}`", check.says, outcome.state, seconds, outcome.found.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "No check here can ask about:", "", *(f"- {what}" for what in OUT_OF_REACH)]
    for check, outcome in rows:
        if outcome.state == "failed":
            lines += ["", f"## {check.name} has failed", "", "```text", outcome.detail.replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"
