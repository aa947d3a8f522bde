"""``ds-pso export``: a Hugging Face model folder from a checkpoint, in one process."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ds_pso.cli.arguments import Subcommands, add_subcommand
from ds_pso.errors import ConfigError

_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges.txt", "*.model", "chat_template*")


def add_to(commands: Subcommands) -> None:
    """Add the parser of this subcommand."""
    parser = add_subcommand(
        commands,
        "export",
        help="a model folder for from_pretrained, from a checkpoint on disk",
        description="Put one model together from the files of a checkpoint: the mean of the particles whose weights "
        "are finite, or one of them. Needs no launcher and no GPU. The files are checked against their hashes first, "
        "and read parameter by parameter: memory is that of the model in its working precision and a little more.",
        example="ds-pso export runs/latest --which best --output best_model",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="RUN",
        help="run folder, its checkpoints folder, or one of its step_* folders; or the HF Trainer's output_dir",
    )
    add("--output", type=Path, metavar="DIR", help="folder to write (default: model_<tag> beside the checkpoints)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--which",
        choices=("consensus", "best"),
        default="consensus",
        help="the mean of the particles (default), or the one with the lowest loss at the last sync point",
    )
    which.add_argument("--particle", type=int, metavar="N", help="particle N alone, counted from 0")
    add("--tag", metavar="STEP", help="which checkpoint, such as step_00000064 (default: the latest)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the model folder, and print its contents."""
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from ds_pso.export.offline import consolidate, find_checkpoint, write

    disable_progress_bar()
    source = find_checkpoint(arguments.source, arguments.tag)
    which = arguments.which if arguments.particle is None else arguments.particle
    model = consolidate(source, which)
    folder = arguments.output or _beside_the_checkpoints(source, which)
    try:
        incomplete = write(model, folder)
        tokenizer = _copy_tokenizer(source, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--output {folder}: cannot be written ({reason}); choose another folder") from error
    dtype = next((str(t.dtype).removeprefix("torch.") for t in model.state_dict.values()), "nothing")
    members = ", ".join(map(str, model.particles))
    print(
        f"{folder}: {f'particle {members}' if which != 'consensus' else f'consensus of particles {members}'} at step "
        f"{model.step}; {model.num_parameters / 1e6:.2f} M parameters and buffers, {dtype}"
    )
    print(f"model.safetensors alone: {incomplete}" if incomplete else "from_pretrained opens it")
    if tokenizer:
        print(f"with the tokenizer of {_from_here(tokenizer)}")
    return 0


def _run_folder(source: Path) -> Path:
    """Return the run folder of a checkpoint; the parent folder, if that is not called ``checkpoints``."""
    from ds_pso.checkpoint.format import is_of_trainer

    folder = source.resolve().parent
    return folder.parent if folder.name == "checkpoints" or is_of_trainer(source) else folder


def _beside_the_checkpoints(source: Path, which: str | int) -> Path:
    suffix = {"consensus": "", "best": "_best"}.get(str(which), f"_particle_{which}")
    return _from_here(_run_folder(source) / f"model_{source.resolve().name}{suffix}")


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _copy_tokenizer(source: Path, folder: Path) -> Path | None:
    """Copy the tokenizer that ``train.py`` or the Trainer saved; return its folder, or None if there is none."""
    run_folder = _run_folder(source)
    for place in (run_folder / "data" / "tokenizer", run_folder / "model", source):
        files = [path for pattern in _TOKENIZER_FILES for path in place.glob(pattern)]
        if files:
            for path in files:
                if path.resolve().parent != folder.resolve():
                    shutil.copy(path, folder)
            return place
    return None
