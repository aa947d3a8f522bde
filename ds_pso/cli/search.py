"""``ds-pso search``: one model from several experts."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ds_pso.cli.arguments import Subcommands, add_subcommand

if TYPE_CHECKING:
    from ds_pso.search.record import Evaluation
    from ds_pso.search.result import SearchResult


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "search",
        help="one model from several experts: searches the coefficients of each in each layer by a score of yours",
        description="Take models of one architecture, or adapters of one base, and search the combination of their "
        "weights that your function scores best: one coefficient per expert and layer. The model is composed in place "
        "from files that are mapped into memory. Ctrl-C or a kill loses one evaluation; --resume goes on.",
        example="ds-pso search experts/code experts/law experts/math --score my_score:held_out_loss --out merged",
    )
    add = parser.add_argument
    add("experts", type=Path, nargs="+", metavar="FOLDER", help="model folders, or adapter folders of peft")
    add("--score", required=True, metavar="MODULE:FUNCTION", help="called with the model, returns a number")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the model and search.json")
    add("--test", metavar="MODULE:FUNCTION", help="scores the result after the search, on other data")
    add("--higher-is-better", action="store_true", help="search a high score (default: a low one, such as a loss)")
    add("--base", type=Path, metavar="FOLDER", help="the model that the experts were made from, if you have it")
    add(
        "--searcher",
        default="pso",
        metavar="NAME",
        help="pso (default), model_swarms, cma, random, greedy_soup, uniform_soup, best_single or task_arithmetic",
    )
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the searcher, such as inertia=0.5")
    add(
        "--blocks",
        choices=("layers", "tensors", "one"),
        default="layers",
        help="what has a coefficient of its own (default: embedding, each layer and head)",
    )
    add("--evaluations", type=int, default=200, metavar="N", help="calls of the score function (default: 200)")
    add("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")
    add("--noisy-score", action="store_true", help="allow that the score of one model varies")
    add("--device", default="auto", help="of the model (default: a GPU if there is one)")
    add("--resume", action="store_true", help="go on with the search in --out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search, and print what came of it."""
    from ds_pso.search.registry import parse_options
    from ds_pso.search.run import SearchSettings, search_experts

    given = {key: value for key, value in vars(arguments).items() if key in SearchSettings.__dataclass_fields__}
    settings = SearchSettings(**given, options=parse_options(arguments.option))
    try:
        with _Progress(settings.evaluations) as progress:
            result = search_experts(settings, progress.show)
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    print(_summary(result, settings.out))
    return 0


class _Progress:
    """A bar on a terminal; elsewhere a line for each improvement."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._total, self._count, self._best = total, 0, math.nan
        self._bar = tqdm(total=total, unit="model", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    def show(self, evaluation: Evaluation, best: float) -> None:
        """Show an evaluation, and the best score so far."""
        self._count += 1
        self._bar.set_postfix_str(f"best {best:.6g}, last {evaluation.score:.6g}", refresh=False)
        self._bar.update()
        if best != self._best and self._bar.disable:
            print(f"evaluation {self._count:>4}/{self._total}: {best:.6g} by {evaluation.by}", flush=True)
        self._best = best


def _summary(result: SearchResult, out: Path) -> str:
    rows = [
        (f"winner: {result.winner.by}", result.winner),
        (f"best single: {result.best_single.by}", result.best_single),
        ("uniform soup", result.uniform_soup),
    ]
    width = max(len(name) for name, _ in rows)
    tested = result.winner.test is not None
    lines = [f"{'':{width}}  {'score':>12}{'test':>14}" if tested else f"{'':{width}}  {'score':>12}"]
    for name, scored in rows:
        test = "" if scored.test is None else f"{scored.test:>14.6g}"
        lines.append(f"{name:{width}}  {scored.score:>12.6g}{test}")
    if not result.improved:
        lines.append(
            f"no improvement: no combination scores better than the best single expert, which {out} holds as it is"
        )
    lines.append(f"{out}: the winner, after {result.evaluations} evaluations; search.json has the coefficients")
    return "\n".join(lines)
