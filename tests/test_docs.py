"""The documentation against the code: snippets, commands, links, tables and error messages."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

import ds_pso
from ds_pso.cli import launch
from ds_pso.cli import main as cli
from ds_pso.comm.compression import wire_options
from ds_pso.config import checks
from ds_pso.config.load import load_config
from ds_pso.config.presets import PRESETS, rule_of, sync_modes
from ds_pso.config.schema import ALLREDUCE, ParticleConfig, SwarmConfig
from ds_pso.elastic.config import ElasticConfig
from ds_pso.rules import RULES
from ds_pso.sync.moment_options import MomentOptions
from ds_pso.sync.schedule import ScheduleConfig
from ds_pso.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md")])
EXAMPLES = sorted(ROOT.glob("ds_config_examples/*.json"))
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
MODES = sync_modes()


def short(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def page(name: str) -> str:
    return TEXT[ROOT / name]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def snippets(language: str) -> list:
    return [
        pytest.param(snippet, id=f"{short(path)}-{index}")
        for path in PAGES
        for index, snippet in enumerate(blocks(TEXT[path], language))
    ]


def run(command: list[str], folder: Path, seconds: float, **environment: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        timeout=seconds,
        env={**os.environ, "MAKEFLAGS": "", "ARGS": "", **environment},  # not those of the make that runs these tests
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


# -- snippets -------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", snippets("json"))
def test_json_snippets_are_valid_configs(snippet, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")  # the module that a snippet names as its sync_mode
    config = json.loads(snippet)
    if "swarm" in config:
        load_config(config)


@pytest.mark.parametrize("snippet", snippets("python"))
def test_python_snippets_compile(snippet):
    compile(snippet, "snippet", "exec")


@pytest.mark.slow
def test_the_complete_script_of_the_api_page_runs(tmp_path):
    script = next(s for s in blocks(page("docs/api.md"), "python") if "__main__" in s)
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    # As it stands it compiles DeepSpeed's shared-memory collectives, under a lock that a killed rank never gives back.
    (tmp_path / "start.py").write_text(
        "import deepspeed, runpy\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
        "runpy.run_path('script.py', run_name='__main__')\n",
        encoding="utf-8",
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", str(port)]
    output = run([*launcher, "start.py", "24"], tmp_path, 200, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert "2 particles x 2 ranks, local_sgd every 4 steps; losses at the last sync point" in output
    assert (tmp_path / "runs/example/checkpoints/latest").read_text().strip() == "step_00000024"
    assert (tmp_path / "runs/example/model/model.safetensors").exists()
    records = [json.loads(line) for line in (tmp_path / "runs/example/metrics.jsonl").read_text().splitlines()]
    assert [(r["event"], r["step"]) for r in records] == [("start", 0), *(("sync", n) for n in range(4, 25, 4))]
    assert max(records[-1]["losses"]) < 0.2 * min(records[1]["losses"])


@pytest.mark.slow
def test_the_worked_example_of_contributing_works(tmp_path):
    """Carries out the steps of "Adding a rule" on a copy."""
    text = page("CONTRIBUTING.md")
    rule, oracle = blocks(text, "python")
    import_line, anchor, new_line = blocks(text, "diff")[0].splitlines()
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("ds_pso", "tests/rules", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "ds_pso/rules/pull.py").write_text(rule, encoding="utf-8")
    (tmp_path / "tests/rules/test_pull.py").write_text(oracle, encoding="utf-8")
    registry = tmp_path / "ds_pso/rules/__init__.py"
    source = registry.read_text(encoding="utf-8")
    assert f"{anchor[1:]}\n" in source
    source = source.replace("\nRULES", f"{import_line[1:]}\n\nRULES", 1)
    registry.write_text(source.replace(anchor[1:], f"{anchor[1:]}\n{new_line[1:]}"), encoding="utf-8")

    here = {"PYTHONPATH": str(tmp_path)}
    output = run([sys.executable, "-m", "pytest", "-q", "tests/rules/test_pull.py"], tmp_path, 120, **here)
    assert "2 passed" in output
    run([sys.executable, "docs/generate_configuration.py"], tmp_path, 120, **here)
    assert "### `swarm.pull`" in (tmp_path / "docs/configuration.md").read_text(encoding="utf-8")
    run([sys.executable, "-m", "ruff", "check", "ds_pso/rules/pull.py"], tmp_path, 60)
    run([sys.executable, "-m", "ruff", "format", "--check", "ds_pso/rules/pull.py"], tmp_path, 60)


# -- commands -------------------------------------------------------------------------------


def commands() -> list:
    found = []
    for path in PAGES:
        for block in blocks(TEXT[path], "sh"):
            found += [pytest.param(line, id=f"{short(path)}-{line[:40]}") for line in block.splitlines() if line]
    in_tables = re.findall(r"\| `(accelerate launch [^`]+)`", page("recipes/README.md"))
    found += [pytest.param(line, id=f"recipes-{line[18:]}") for line in in_tables]
    return found


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line, capsys, monkeypatch):
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # for this command's environment
        words.pop(0)
    if words[0] == "sbatch" or words[0].startswith("launcher/"):
        check_start(words)
        return
    if words[:2] == ["ds-pso", "export"]:
        assert cli._parser().parse_args(words[1:]).source == Path("runs/latest")
        return
    if words[:2] in (["ds-pso", "plan"], ["ds-pso", "check"]):
        monkeypatch.chdir(ROOT)
        assert cli.main(words[1:]) == 0
        assert f"```\n{capsys.readouterr().out}```" in "".join(TEXT.values()), (
            "prints something else than the page says"
        )
        return
    if words[:2] == ["ds-pso", "launch"]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(launch, "_check_host", lambda host: None)  # not of this machine
        started = launch.supervisor_of(cli._parser().parse_args(words[1:]))
        parse_arguments(started.script[1:])
        return
    if words[:2] == ["ds-pso", "search"]:
        assert cli._parser().parse_args(words[1:]).experts
        return
    if words[:2] == ["ds-pso", "report"]:
        assert cli._parser().parse_args(words[1:]).runs
        return
    if words[0] in ("kubectl", "sky", "docker"):
        named = [word for word in words if word.startswith("launcher/")]
        assert named
        assert all((ROOT / name).is_file() for name in named)
        return
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), "no such target"
        wanted = words[1]
        words = shlex.split(run(["make", "-n", "--no-print-directory", *words[1:]], ROOT, 60).splitlines()[-1])
        if wanted != "train":
            return
    if words[0] == "pip":
        assert words[1] == "install"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", line)) <= set(extras)
        return
    if words == ["ds-pso", "--help"]:  # test_package.py does it where ds_pso is installed
        return
    if "-m" in words and words[0] != "pytest":
        module = words.index("-m")
        if words[0] != "python":
            check_launcher(words[: module + 2])
        check_module(words[module + 1], words[module + 2 :], monkeypatch)
        return
    if words[0] in ("pytest", "python"):
        named = [word for word in words[1:] if word.endswith(".py")]
        assert all((ROOT / name).exists() for name in named)
        assert named or "-m" in words
        return
    if words[:2] == ["accelerate", "launch"]:
        check_accelerate(words[2:])
        return
    if words[-1] == "script.py":  # that of the page; test_snippets.py runs it
        return
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "ds-pso":
        assert words[1:program] == ["simulate"]
    else:
        check_launcher(words[: program + 1])
    assert (ROOT / words[program]).exists()
    arguments = parse_arguments(words[program + 1 :])
    if arguments.deepspeed_config:
        load_config(ROOT / arguments.deepspeed_config)


def check_start(words: list[str]) -> None:
    """A file of launcher/, and perhaps a script with its arguments."""
    file = next(index for index, word in enumerate(words) if word.startswith("launcher/"))
    assert os.access(ROOT / words[file], os.X_OK)
    if words[file + 1 :]:
        assert (ROOT / words[file + 1]).exists()
        parse_arguments(words[file + 2 :])


def check_module(name: str, arguments: list[str], monkeypatch) -> None:
    """The module's own parser takes the arguments; nothing else of it happens."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise StopIteration

    module = importlib.import_module(f"{name}.__main__")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(StopIteration):
        module.main()


def check_launcher(words: list[str]) -> None:
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args
    else:
        from deepspeed.launcher.runner import parse_args

        assert words[0] == "deepspeed"
    parse_args(words[1:])


def check_accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(words)
    for name in (arguments.config_file, arguments.deepspeed_config_file):
        assert name is None or (ROOT / name).exists()
    path = ROOT / arguments.training_script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if hasattr(recipe, "parse"):
        recipe.parse(arguments.training_script_args)


def test_training_page_lists_the_arguments_of_train_py(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    accepted = set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}
    table = dict(re.findall(r"^\| `(--\w+)` \| (.+?) \|", page("docs/training.md"), flags=re.MULTILINE))
    assert set(table) == accepted
    for name, default in vars(parse_arguments([])).items():
        if f"--{name}" in table and default not in (None, False):
            assert table[f"--{name}"].strip("`") == str(default)


# -- links and paths ------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Anchors as GitHub makes them from headings, and explicit ones."""
    slugs = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slugs.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return slugs


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXT[path])):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_paths_that_are_named_exist(path):
    yet_to_be_written = {"ds_pso/rules/pull.py", "tests/rules/test_pull.py"}
    folders = "ds_pso|docs|tests|recipes|launcher|ds_config_examples"
    for name in set(re.findall(rf"`((?:{folders})/[\w./-]+)`", TEXT[path])) - yet_to_be_written:
        assert (ROOT / name).exists(), name


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", page("README.md")))
    assert linked == {short(path) for path in ROOT.glob("docs/*.md")}


# -- what merging leaves behind -------------------------------------------------------------
# Pages are merged line by line, so that a paragraph that two have changed stands there twice.


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_nothing_stands_twice(path):
    for paragraph in re.split(r"\n\s*\n", prose(TEXT[path])):
        lines = [line.strip() for line in paragraph.splitlines() if not line.startswith(("|", "**`"))]
        assert not repeated(text for text in re.split(r"(?<=\.) ", " ".join(lines)) if len(text) > 35)


def tables_of(path: Path) -> list[list[str]]:
    found = re.findall(r"(?:^\|.*\n)+", prose(TEXT[path]), flags=re.MULTILINE)
    return [[line for line in table.splitlines()[2:] if not line.startswith("| |")] for table in found]


def repeated(items) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_no_row_of_a_table_stands_twice(path):
    for table in tables_of(path):
        assert not repeated(line.split(" | ")[0] for line in table)


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_messages_tables_and_pictures_stand_apart(path):
    lines = prose(TEXT[path]).splitlines()
    for line, after in itertools.pairwise(lines):
        if after.startswith("**`…") or after.startswith("**`swarm"):
            assert not line or line.startswith("**`"), after
        if line.startswith(("|", "![")):
            assert not after or after.startswith("|"), after


def test_the_changelog_says_everything_once():
    names = re.findall(r"^- `([^`]+)`", page("CHANGELOG.md"), flags=re.MULTILINE)
    assert len(names) > 20
    assert not repeated(names)


# -- tables ---------------------------------------------------------------------------------


def test_configuration_page_is_up_to_date():
    path = ROOT / "docs" / "generate_configuration.py"
    spec = importlib.util.spec_from_file_location("generate_configuration", path)
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.main(["--check"]) == 0, "run: python docs/generate_configuration.py"
    for model in [SwarmConfig, *(rule.Config for rule in RULES.values())]:
        for key, field in model.model_fields.items():
            assert f"| `{key}` |" in page("docs/configuration.md")
            assert field.description, f"{model.__name__}.{key} has no description"


def allowed_values() -> list:
    """Section, key and value of each literal that a table says is allowed."""
    found = []
    for section, table in re.findall(
        r"^### `swarm\.?(\w*)`\n\n((?:\|.+\n)+)", page("docs/configuration.md"), re.MULTILINE
    ):
        for key, allowed in re.findall(r"^\| `(\w+)` \| (.+?) \|", table, flags=re.MULTILINE):
            found += [(section, key, value) for value in re.findall(r"`([^`]+)`", allowed) if ":" not in value]
    return found


@pytest.mark.parametrize(("section", "key", "value"), allowed_values())
def test_a_value_that_a_table_allows_is_accepted(section, key, value):
    models = {"": SwarmConfig, "schedule": ScheduleConfig, "per_particle": ParticleConfig, "elastic": ElasticConfig}
    models["moments"] = MomentOptions
    models |= {name: rule.Config for name, rule in RULES.items()} | wire_options()
    given = rule_of(json.loads(value)) if key == "sync_mode" else json.loads(value)
    errors = []
    try:
        models[section].model_validate({key: given})
    except ValidationError as error:
        errors = error.errors()
    assert all(item["loc"] == () for item in errors), errors  # whether it goes with other keys is another matter


def test_every_sync_mode_is_documented():
    table = page("docs/sync-modes.md").split("## What each costs")[1].split("| --- |", 1)[1].split("\n\n")[0]
    assert re.findall(r"^\| \[`(\w+)`\]\(#\1\) \|", table, flags=re.MULTILINE) == MODES
    assert re.findall(r"^## (\w+)$", page("docs/sync-modes.md"), flags=re.MULTILINE)[: len(MODES)] == MODES


def test_example_table_agrees_with_the_files():
    rows = re.findall(
        r"^\| \[(\w+\.json)\]\(\1\) \| (\d) \| `(\w+)`(?:, (\d+))? \|",
        page("ds_config_examples/README.md"),
        flags=re.MULTILINE,
    )
    assert sorted(row[0] for row in rows) == [path.name for path in EXAMPLES]
    for name, stage, mode, interval in rows:
        config, swarm = load_config(ROOT / "ds_config_examples" / name)
        assert config["zero_optimization"]["stage"] == int(stage)
        assert swarm.sync_mode == (PRESETS[mode].rule if mode in PRESETS else mode)
        assert interval == ("" if mode == ALLREDUCE else str(swarm.sync_interval))
        assert config["scheduler"]["params"]["decay_ratio"] == 0.2
        assert config["optimizer"]["params"]["lr"] == (0.02 if config["optimizer"]["type"] == "Muon" else 0.002)
        assert config["train_micro_batch_size_per_gpu"] == 4


def test_the_built_in_config_is_the_example_that_make_train_uses():
    built_in = json.loads((ROOT / "ds_pso/training/default_config.json").read_text())
    assert built_in == json.loads((ROOT / "ds_config_examples/zero2_slow_network.json").read_text())


# -- the API --------------------------------------------------------------------------------


def test_api_page_names_the_calls_as_they_are():
    text = page("docs/api.md")
    for owner, name, parameters in re.findall(r"`(ds_pso|swarm)\.(\w+)\(([^`]*?)\)(?: -> [\w\[\]]+)?`", text):
        function = getattr(ds_pso if owner == "ds_pso" else ds_pso.Swarm, name)
        if f"### `{owner}.{name}({parameters})" not in text:
            continue  # a call in a sentence
        actual = [
            str(p).split(":")[0] if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"')
            for p in inspect.signature(function).parameters.values()
            if p.name != "self"
        ]
        assert [part for part in parameters.split(", ") if part and part != "*"] == actual, name


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_attributes_of_the_swarm_that_are_named_exist(path):
    swarm = ds_pso.init({"swarm": {"particles": 1}})
    try:
        attributes, keys = set(dir(swarm)), {*SwarmConfig.model_fields, *RULES, *wire_options(), "pull", "py", "svg"}
    finally:
        swarm.close()
    text = TEXT[path] if short(path) != "CONTRIBUTING.md" else prose(TEXT[path])  # its tests have another swarm
    for name in re.findall(r"\bswarm\.([a-z_]+)", text):
        assert name in attributes | keys or name == "particels", name  # the example of a misspelt key


def test_deepspeed_clips_where_the_page_says_so():
    from deepspeed.runtime.config import get_gradient_clipping

    assert get_gradient_clipping({}) == 1.0
    assert get_gradient_clipping({"gradient_clipping": 0}) == 0
    assert "DeepSpeed clips gradients at a norm of 1.0 unless `gradient_clipping`" in page("docs/sync-modes.md")


# -- error messages -------------------------------------------------------------------------

GAP = "…"


def template(node: ast.AST) -> str | None:
    """A string in the source, with a gap for each value that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values)
    return None


EXCLUSIONS = [f"{GAP}: " + re.sub(r"{[^}]*}", GAP, row.message) for row in checks.EXCLUSIONS]
SOURCES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted([*ROOT.glob("ds_pso/**/*.py"), *ROOT.glob("recipes/*.py")])
]


def documented_messages() -> list[str]:
    lines = [line for line in page("docs/troubleshooting.md").splitlines() if line.startswith("**`")]
    return [message.strip(GAP) for line in lines for message in re.findall(r"\*\*`([^`]+)`\*\*", line)]


@functools.cache
def templates() -> list[str]:
    found = (template(node) for tree in SOURCES for node in ast.walk(tree))
    return [*EXCLUSIONS, *(text for text in found if text)]


@pytest.mark.parametrize("message", documented_messages())
def test_documented_messages_are_in_the_code(message):
    assert any(message in text for text in templates())


def test_every_error_is_documented():
    kinds = {"ArgumentTypeError", "SwarmError", *(kind.__name__ for kind in ds_pso.SwarmError.__subclasses__())}
    documented = [message for message in documented_messages() if len(message.replace(GAP, "")) > 10]
    missing = [text for text in EXCLUSIONS if not any(message in text for message in documented)]
    for tree in SOURCES:
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            text = template(node.args[0]) if name in kinds else None
            says_something = text and len(text.replace(GAP, "").strip(" :;()=.")) > 3
            if says_something and not any(message in text for message in documented):
                missing.append(text)
    assert not missing, "describe in docs/troubleshooting.md:\n" + textwrap.indent("\n".join(missing), "  ")
