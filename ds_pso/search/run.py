"""A whole search: experts in, one model and a record out."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_pso.errors import ConfigError
from ds_pso.search.evaluator import Evaluator, score_references
from ds_pso.search.experts import Expert, names_of, open_all
from ds_pso.search.model import ComposedModel
from ds_pso.search.record import Evaluation, Record
from ds_pso.search.registry import make_options, make_searcher
from ds_pso.search.result import SearchResult, conclude
from ds_pso.search.space import BlockKind, Coefficients, Space, find_blocks
from ds_pso.utils.folder_lock import lock_folder

ScoreFunction = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search.

    Attributes:
        experts: folders of models, or of adapters of one base.
        out: folder for the model and ``search.json``.
        score: a function, or its name as ``module:function``; it gets the model, in evaluation mode, and returns a
            number.
        test: as ``score``; scores the result, the best single expert and the uniform soup once, after the search.
        base: folder of the model that the experts were made from, if it is known.
        searcher: its name in ``SEARCHERS``.
        options: of the searcher.
        blocks: what has a coefficient of its own.
        evaluations: calls of the score function, at most.
        seed: of all random numbers.
        higher_is_better: whether the score is to be as high as possible; else as low.
        noisy_score: whether the score of one model may vary.
        resume: whether to go on with the record in ``out``.
        device: of the model; ``auto``: a GPU if there is one.
    """

    experts: Sequence[Path]
    out: Path
    score: str | ScoreFunction
    test: str | ScoreFunction | None = None
    base: Path | None = None
    searcher: str = "pso"
    options: Mapping[str, object] = field(default_factory=dict)
    blocks: BlockKind = "layers"
    evaluations: int = 200
    seed: int = 0
    higher_is_better: bool = False
    noisy_score: bool = False
    resume: bool = False
    device: str = "auto"


def search_experts(
    settings: SearchSettings, on_evaluation: Callable[[Evaluation, float], None] = lambda evaluation, best: None
) -> SearchResult:
    """Search, and write the best model to ``settings.out``.

    A search that was killed goes on with ``resume``, bit for bit; one that has ended, too, if it is given more
    evaluations.

    Args:
        on_evaluation: called after each evaluation, with it and the best score so far.

    Raises:
        ConfigError: names the setting that is wrong.
        CheckpointError: the record cannot be resumed.
        UnsupportedError: a model that cannot be composed in place.
    """
    options = make_options(settings.searcher, settings.options)
    score = find_function(settings.score, "--score")
    test = find_function(settings.test, "--test") if settings.test else None
    experts, base = open_all(settings.experts, settings.base)
    least = len(experts) + 2 + (base is not None)
    if settings.evaluations < least:
        raise ConfigError(
            f"--evaluations {settings.evaluations}: must be at least {least}: the experts, the first of them twice, "
            "their mean, and the base if there is one"
        )
    _check_out(settings)
    device = _device(settings.device)
    with _locked(settings.out):
        known = _known_settings(settings, options.model_dump(), experts, base)
        record = Record.open(settings.out, known, resume=settings.resume)
        model = ComposedModel(experts, base, device)
        space = Space(names_of(experts), find_blocks(model.shapes, settings.blocks), base is not None)
        searcher = make_searcher(settings.searcher, space, settings.seed, options)
        evaluator = Evaluator(
            record,
            lambda c: _score(model, space, c, score, "--score"),
            settings.evaluations,
            higher_is_better=settings.higher_is_better,
            on_evaluation=on_evaluation,
        )
        score_references(evaluator, space, noisy=settings.noisy_score)
        evaluator.run(searcher)
        result = conclude(
            evaluator, record, space, None if test is None else lambda c: _score(model, space, c, test, "--test")
        )
        assert evaluator.best is not None
        model.compose(space, evaluator.best.coefficients)
        model.save(settings.out)
        return result


def find_function(spec: str | ScoreFunction, key: str) -> ScoreFunction:
    """Return the function that ``module:function`` names; modules are also looked for in the current folder.

    Raises:
        ConfigError: there is none; names ``key``.
    """
    if not isinstance(spec, str):
        return spec
    module_name, colon, name = spec.partition(":")
    if not colon:
        raise ConfigError(f"{key} {spec}: must name a function as my_module:my_function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ConfigError(
            f"{key} {spec}: cannot be imported ({type(error).__name__}: {error}); is it installed, or in this folder, "
            "or in one of PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key} {spec}: {module_name} has no function of this name; check the spelling")
    return found


def _score(model: ComposedModel, space: Space, c: Coefficients, function: ScoreFunction, key: str) -> float:
    model.compose(space, c)
    with torch.no_grad():
        returned = function(model.module)
    try:
        return float(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}: returned a {type(returned).__name__}; let it return a number") from error


def _known_settings(
    settings: SearchSettings, options: Mapping[str, Any], experts: Sequence[Expert], base: Expert | None
) -> dict[str, Any]:
    """Return what decides which candidates are scored, and how; more evaluations may follow."""
    return {
        "experts": [[name, expert.fingerprint()] for name, expert in zip(names_of(experts), experts, strict=True)],
        "base": None if base is None else base.fingerprint(),
        "score": settings.score if isinstance(settings.score, str) else _name_of(settings.score),
        "higher_is_better": settings.higher_is_better,
        "searcher": settings.searcher,
        "options": dict(options),
        "blocks": settings.blocks,
        "seed": settings.seed,
    }


def _name_of(function: ScoreFunction) -> str:
    module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
    return f"{module}:{name or type(function).__qualname__}"


def _check_out(settings: SearchSettings) -> None:
    sources = [*settings.experts, *filter(None, [settings.base])]
    if settings.out.resolve() in {source.resolve() for source in sources}:
        raise ConfigError(f"--out {settings.out}: is the folder of an expert or the base; give another one")
    if settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"--out {settings.out}: is a file; give a folder")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: cannot be used ({reason}); give auto, cpu or cuda:<number>") from error
    return device


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        lock = lock_folder(folder)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({error.strerror}); give another folder") from error
    try:
        yield
    finally:
        lock.release()
