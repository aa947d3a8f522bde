"""``ds-pso simulate``: a script runs as python would run it, once for every particle, and ends with its exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pool import Pool

from ds_pso.cli import main as cli

DS_PSO = Path(sys.executable).with_name("ds-pso")
SWARM = 'ds_pso.init({"swarm": {"particles": 3, "sync_mode": "local_sgd"}})'
TELL = """
    import json, os, sys
    import helper
    print(json.dumps({
        "name": __name__,
        "file": os.path.abspath(__file__),
        "argv": sys.argv,
        "path": sys.path[0],
        "folder": os.getcwd(),
        "helper": helper.VALUE,
        "doc": __doc__,
    }))
"""


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(source).lstrip(), encoding="utf-8")
    return path


@dataclass
class End:
    """What became of a call of ``main``."""

    code: Any  # or the exception
    out: str
    err: str
    restored: bool  # sys is as it was before


def call(calls: list[list[str]], folder: Path) -> list[End]:
    """``ds-pso`` with these arguments, one after the other, in one process that is in this folder."""
    os.chdir(folder)
    ends = []
    for argv in calls:
        before = sys.argv, list(sys.argv), list(sys.path)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: Any = cli.main(argv)
            except BaseException:
                code = traceback.format_exc()
        restored = sys.argv is before[0] and (sys.argv, sys.path) == before[1:]
        ends.append(End(code, out.getvalue(), err.getvalue(), restored))
    return ends


def end_of(pool: Pool, script: Path, *arguments: str) -> End:
    """Of a script that is called from another folder than its own."""
    ((end,),) = pool.run(call, [["simulate", str(script), *arguments]], script.parents[1], world_size=1)
    return end


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_"))}
    return subprocess.run(
        command,
        cwd=folder,
        timeout=120,
        env=clean | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


# -- as python would --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script_finds_what_python_would_give_it(tmp_path: Path):
    """In a true process, started elsewhere than where the script lies."""
    write(tmp_path / "inner" / "helper.py", "VALUE = 42\n")
    write(tmp_path / "inner" / "script.py", '"""What it is for."""\n' + textwrap.dedent(TELL))
    words = ["inner/script.py", "--steps", "3", "-h", "--", "a b", "--help"]
    expected = run([sys.executable, *words], tmp_path)
    actual = run([DS_PSO, "simulate", *words], tmp_path)
    assert actual.returncode == expected.returncode == 0, actual.stderr
    told = json.loads(actual.stdout.splitlines()[-1])  # DeepSpeed talks, too
    assert told == json.loads(expected.stdout)
    assert told["name"] == "__main__"
    assert told["argv"] == words
    assert told["doc"] == "What it is for."


def test_every_particle_executes_it_anew(pool: Pool, tmp_path: Path):
    write(tmp_path / "helper.py", "count = 0\n")
    script = write(
        tmp_path / "script.py",
        f"""
        import sys
        import ds_pso
        import helper

        assert "mine" not in globals(), "names of another particle"
        mine = True
        helper.count += 1  # what is imported is shared
        with {SWARM} as swarm:
            swarm.gather(0.0)
            print(swarm.particle, swarm.num_particles, sys.argv[1], helper.count)
        """,
    )
    end = end_of(pool, script, "word")
    assert (end.code, end.restored) == (0, True)
    assert end.err.count("Warning") == 1, end.err
    assert "no engine was attached" in end.err
    assert sorted(end.out.splitlines()) == [f"{particle} 3 word 3" for particle in range(3)]


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("", 0, ""),
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit(0)", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit(True)", 1, ""),
        ("import sys; sys.exit('no data')", 1, "no data\n"),
        ("import sys; sys.exit('')", 1, "\n"),
        ("raise SystemExit", 0, ""),
        (
            "import argparse; argparse.ArgumentParser(prog='mine').error('bad')",
            2,
            "usage: mine [-h]\nmine: error: bad\n",
        ),
    ],
)
def test_exit_codes_are_those_of_python(pool: Pool, tmp_path: Path, source: str, code: int, said: str):
    script = write(tmp_path / "script.py", source)
    assert end_of(pool, script) == End(code, "", said, restored=True)
    expected = run([sys.executable, "-S", "-E", script], tmp_path)
    assert (expected.returncode, expected.stderr) == (code, said)


def test_the_worst_exit_code_of_the_particles_counts(pool: Pool, tmp_path: Path):
    source = f"""
        import sys
        import ds_pso
        with {SWARM} as swarm:
            swarm.gather(0.0)
        sys.exit([0, 5, 3][swarm.particle])
    """
    assert end_of(pool, write(tmp_path / "script.py", source)).code == 5


def test_a_negative_exit_code_of_one_particle_counts(pool: Pool, tmp_path: Path):
    source = f"""
        import sys
        import ds_pso
        with {SWARM} as swarm:
            swarm.gather(0.0)
        sys.exit(-swarm.particle)
    """
    assert end_of(pool, write(tmp_path / "script.py", source)).code != 0


def test_file_is_absolute_as_of_any_main_module(tmp_path: Path, pool: Pool):
    write(tmp_path / "script.py", "print(__file__)")
    ((end,),) = pool.run(call, [["simulate", "script.py"]], tmp_path, world_size=1)
    assert end.out == f"{tmp_path / 'script.py'}\n"


def test_annotations_mean_what_they_mean_in_the_script(pool: Pool, tmp_path: Path):
    script = write(tmp_path / "script.py", "def f(x: int): ...\nprint(f.__annotations__['x'] is int)\n")
    assert end_of(pool, script).out == "True\n"


def test_classes_of_a_script_can_be_pickled(pool: Pool, tmp_path: Path):
    source = """
        import pickle
        class Mine: ...
        print(type(pickle.loads(pickle.dumps(Mine()))) is Mine)
    """
    assert end_of(pool, write(tmp_path / "script.py", source)).out == "True\n"


# -- errors -----------------------------------------------------------------------------------


def test_an_error_of_the_script_is_its_own(pool: Pool, tmp_path: Path):
    script = write(tmp_path / "script.py", "import sys\n\n1 / 0\n")
    end = end_of(pool, script)
    assert (end.out, end.err, end.restored) == ("", "", True)
    assert end.code.endswith("ZeroDivisionError: division by zero\n")
    assert f'File "{script}", line 3, in <module>' in end.code, "the traceback leads to the line"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (f"import ds_pso\n{SWARM.replace('3', '0')}", "config: swarm.particles = 0: must be a whole number"),
        (f"import ds_pso\n{SWARM.replace('3', chr(34) + 'node' + chr(34))}", 'swarm.particles = "node": a simulation'),
        ("from ds_pso.errors import PeerError\nraise PeerError('one\\n  line')", "one line\n"),
        ("def broken(:\n", "script.py: cannot be run (invalid syntax (script.py, line 1)); give a Python script\n"),
        (b"\x00", "script.py: cannot be run (source code string cannot contain null bytes); give a Python script\n"),
        (b"\xff = 1", "script.py: cannot be run ("),
        (None, "script.py: cannot be run ([Errno 2] No such file or directory: "),
    ],
)
def test_errors_that_were_foreseen_are_one_line(pool: Pool, tmp_path: Path, source: str | bytes | None, said: str):
    script = tmp_path / "script.py"
    if source is not None:
        script.write_bytes(source.encode() if isinstance(source, str) else source)
    end = end_of(pool, script)
    assert (end.code, end.out, end.restored) == (1, "", True)
    assert end.err.count("\n") == 1
    line = end.err.replace(f"{tmp_path}{os.sep}", "")
    assert line.startswith("ds-pso: error: ")
    assert line.removeprefix("ds-pso: error: ").startswith(said)


def test_a_folder_is_no_script(pool: Pool, tmp_path: Path):
    end = end_of(pool, tmp_path)
    assert end.code == 1
    assert end.err.startswith(f"ds-pso: error: {tmp_path}: cannot be run ([Errno 21] Is a directory: ")


def test_one_call_knows_nothing_of_the_one_before(pool: Pool, tmp_path: Path):
    write(tmp_path / "one" / "only_here.py", "")
    good = write(tmp_path / "one" / "good.py", "import sys, only_here; print(sys.argv[1:])")
    bad = write(tmp_path / "two" / "bad.py", "import sys; del sys.modules['only_here']; import only_here")
    calls = [["simulate", str(good), "a"], ["simulate", str(bad)], ["simulate", str(good)]]
    (ends,) = pool.run(call, calls, tmp_path, world_size=1)
    assert [end.out for end in ends] == ["['a']\n", "", "[]\n"]
    assert "ModuleNotFoundError: No module named 'only_here'" in ends[1].code, "the folder of the first script"
    assert all(end.restored for end in ends)


# -- the command itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "simulate"),
        (["simulate", "--help"], 0, "passed on to the script"),
        ([], 2, "COMMAND"),
        (["simulate"], 2, "script"),
        (["simulte", "script.py"], 2, "simulate"),
    ],
)
def test_help_and_wrong_usage(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    captured = capsys.readouterr()
    assert end.value.code == code
    text, other = (captured.err, captured.out) if code else (captured.out, captured.err)
    assert text.startswith("usage: ds-pso")
    assert said in text
    assert other == ""


def test_without_arguments_main_reads_those_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ds-pso", "simulate", "-h"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "usage: ds-pso simulate" in capsys.readouterr().out
