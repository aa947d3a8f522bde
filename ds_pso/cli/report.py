"""``ds-pso report``: the logs of runs as a page."""

from __future__ import annotations

import argparse

from ds_pso.cli.arguments import Subcommands, add_subcommand


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "report",
        help="a page of figures and numbers from the metrics of one or several runs",
        description="Write report.html, one page that needs no network and no other file, and its figures as PNG files "
        "in report/. Works while a run goes on; several runs are drawn over one another.",
        example="ds-pso report runs/latest runs/latest.1 --output runs/compared",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or its metrics.jsonl")
    parser.add_argument("--output", metavar="DIR", help="where to write (default: the folder of the first run)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and print its path."""
    from ds_pso.report import write_report

    print(write_report(arguments.runs, arguments.output))
    return 0
