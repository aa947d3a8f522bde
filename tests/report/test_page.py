"""The page: complete in itself, well-formed, and nothing from a file is more than text on it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from made_runs import losses, small, start, sync, write
from matplotlib import image as mpl_image
from variants import slow_but

from ds_pso.cli import main as cli
from ds_pso.report import write_loss_picture, write_report
from ds_pso.report.drawing import LIGHT
from ds_pso.report.figures import pictures
from ds_pso.report.page import duration, facts, render, state, table
from ds_pso.report.reading import read_runs


def parsed(page: str) -> ElementTree.Element:
    """The page is XML as well as HTML, so that a tag that is not closed, or open text, is noticed."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.split("\n", 1)[1])


def is_self_contained(page: str) -> None:
    tree = parsed(page)
    for element in tree.iter():
        assert element.tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "image"), (
            element
        )
        for name, value in element.attrib.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "action", "data"), name
            if name.endswith("href"):
                assert value.startswith("#")
            assert not re.search(r"url\((?!#)", value), value
    style = tree.find("head/style").text
    assert "url(" not in style
    assert "@import" not in style


def cells(page: str) -> list[list[str]]:
    """Text of the first table."""
    return [[cell.text or "" for cell in row] for row in parsed(page).find(".//table").iter("tr")]


def test_the_report_of_a_run(tmp_path):
    folder = write(tmp_path / "first", small())
    path = write_report([folder])
    assert path == folder / "report.html"
    page = path.read_text(encoding="utf-8")
    is_self_contained(page)
    assert cells(page) == [
        ["run", "final loss", "held-out", "exported", "steps", "time", "sync points", "MB received", "stood still"],
        ["first", "1.500", "4.000", "3.500", "12", "10.0 s", "3", "5.0", "20.0 %"],
    ]
    assert "2 particles x 3 ranks, swarm every 4 steps" in page
    titles = [heading.text for heading in parsed(page).iter("h2")]
    pictures = {file.stem for file in (folder / "report").iterdir()}
    assert len(titles) == page.count("<svg") == len(pictures)
    assert pictures == {
        *(
            "loss_steps",
            "loss_time",
            "loss_bytes",
            "held_out",
            "drift",
            "best",
            "rule",
            "sync_time",
            "bytes",
            "bandwidth",
        )
    }
    assert "<metadata" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))

    before = path.read_bytes(), {file: file.read_bytes() for file in (folder / "report").iterdir()}
    write_report([folder])
    assert (path.read_bytes(), {file: file.read_bytes() for file in (folder / "report").iterdir()}) == before


def test_the_picture_of_the_losses(tmp_path):
    write_loss_picture(write(tmp_path / "run", small()), tmp_path / "loss.png")
    pixels = mpl_image.imread(tmp_path / "loss.png")[:, :, :3]
    found = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (255 * pixels.reshape(-1, 3)).round().astype(int)}
    assert {LIGHT["ink"], LIGHT["c0"], LIGHT["c1"], LIGHT["grid"]} <= found  # mean, particles, sync points


def test_runs_are_compared(tmp_path):
    better = [
        start(),
        losses("held_out", 0, 2.5, [8.0, 8.0]),
        sync(4, 3.0, [1.0, 1.0]),
        losses("held_out", 4, 4.0, [5.0] * 2),
    ]
    folders = [write(tmp_path / "worse", small()), write(tmp_path / "better", better)]
    path = write_report(folders, tmp_path / "elsewhere")
    assert path == tmp_path / "elsewhere" / "report.html"
    page = path.read_text(encoding="utf-8")
    is_self_contained(page)
    assert [row[0] for row in cells(page)] == ["run", "worse", "better"]
    assert "2 runs compared" in page
    lowest = [[cell["text"] for cell in row if cell["lowest"]] for row in table(read_runs(folders))]
    assert lowest == [["4.000", "3.500"], ["1.000"]]


HOSTILE = "<script>alert(1)</script>\"'&$_{]]>-->"


def test_nothing_from_a_file_is_more_than_text(tmp_path):
    folders = [tmp_path / HOSTILE.replace("/", ""), tmp_path / "$x_{$"]
    odd = start(
        description=HOSTILE,
        backend=HOSTILE,
        swarm={HOSTILE: {HOSTILE: HOSTILE}, "wire": HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    for folder in folders:
        write(folder, [odd, *(sync(step, step, [1.0, 2.0], **{HOSTILE: step, "guard": HOSTILE}) for step in (4, 8))])
        (folder / "config.json").write_text(json.dumps({"arguments": {HOSTILE: HOSTILE, "model": HOSTILE}}))
    page = write_report(folders, images=False).read_text(encoding="utf-8")
    is_self_contained(page)
    text = "".join(parsed(page).itertext())
    assert text.count(HOSTILE) >= 6
    assert HOSTILE.replace("/", "") in text


# -- what cannot be taken for granted ---------------------------------------------------------

CASES = {
    "has just begun": [start()],
    "no sync point yet": [start(), losses("held_out", 0, 3.0, [8.0, 8.0])],
    "one sync point": [start(), sync(4, 3.0, [2.0, 1.0])],
    "allreduce": [
        start(description="1 particle x 4 ranks: plain DeepSpeed", particles=1, ranks=4, backend="none"),
        *(losses(event, step, step + 3.0, [9.0 - step]) for step in (2, 4) for event in ("train", "held_out")),
    ],
    "nothing finite": [start(), *(sync(step, step, [None, None], alive=[False, False], drift=None) for step in (4, 8))],
    "asynchronous": [
        start(),
        *(
            sync(4 * i, float(i), [9.0 - i, None], waited_s=0, **{"from": 1, "age": i % 2, "pressure": i / 4})
            for i in (1, 2, 3)
        ),
    ],
    "streaming": [
        start(),
        *(
            sync(4 * i, float(i), [9.0 - i, 8.0], fragment=i % 2, abandoned=i == 2, staleness=1, overlapped_s=0.4)
            for i in (1, 2, 3)
        ),
    ],
    "delayed": [
        start(),
        *(
            sync(
                4 * i,
                float(i),
                [9.0, 8.0],
                staleness=3,
                overlapped_s=1.0,
                fragments_s=[0.1, 0.2],
                fragments_staleness=[1, 3],
            )
            for i in (1, 2)
        ),
    ],
    "resumed": [start(), sync(4, 3.0, [2.0, 1.0]), start(4, 3.0), sync(8, 5.0, [1.5, 1.0])],
    "older": [sync(4, 3.0, [2.0, 1.0])],
    "other numbers of losses": [start(), sync(4, 3.0, [2.0, 1.0]), sync(8, 4.0, [2.0]), sync(12, 5.0, [1.0, 2.0, 3.0])],
    "diverged": [start(), *(sync(4 * i, float(i), [10.0**i, 8.0]) for i in range(1, 30))],
    "two at one step": [start(), sync(4, 3.0, [2.0, 1.0]), sync(4, 3.5, [2.0, 1.0])],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", slow_but(("has just begun", "nothing finite", "delayed", "diverged"), CASES))
def test_any_run_gives_a_page(tmp_path, name):
    folder = write(tmp_path / "run", CASES[name], rest='{"event": "sync", "step": 1')
    page = write_report([folder], images=False).read_text(encoding="utf-8")
    is_self_contained(page)
    assert (page.count("<svg") == 0) == (name == "has just begun")


def test_a_long_run_of_many_particles_stays_small(tmp_path):
    records = [start(particles=16)]
    records += [sync(4 * i, float(i), [5.0 + (i * p) % 7 for p in range(16)]) for i in range(1, 1000)]
    page = write_report([write(tmp_path, records)], images=False)
    assert page.stat().st_size < 2_000_000
    assert "Each point is the mean of 3 of them." in page.read_text()


def sentences(tmp_path: Path, *records) -> list[str]:
    return facts(read_runs([write(tmp_path, records)])[0])


def test_what_is_said_of_a_run(tmp_path):
    how, *others = sentences(tmp_path, *small())
    assert how == "Weights travel as int4; training waits at sync points; ZeRO 2; 1.5 million trained parameters."
    assert others == [
        "The guard preferred the weighted mean at 1 of 2 sync points where it had a choice.",
        "Particle 1 was left out of 1 sync point.",
    ]
    assert sentences(tmp_path, start(particles=1), losses("train", 4, 3.0, [1.0]))[1:] == [
        "One particle: plain DeepSpeed, without sync points."
    ]
    one = start(particles=1, sync_points=True)
    assert sentences(tmp_path, one, losses("train", 4, 3.0, [1.0]))[1:] == ["No sync point yet."]
    assert sentences(tmp_path, one, sync(4, 3.0, [1.0], weights=[1.0])) == ["ZeRO 2; 1.5 million trained parameters."]
    assert sentences(tmp_path, start(backend="simulated"), sync(4, 3.0, [1.0, 2.0], weights=[0.5, 0.5]))[1:] == [
        "Simulated in one process: bytes are those of a real run, times mean nothing and are not shown.",
        "At every sync point all particles had the same weight in the consensus.",
    ]
    late = start(swarm={"wire": "fp32", "delay": 3})
    assert "Weights travel as fp32; applied 3 steps later" in sentences(tmp_path, late)[0]
    assert "Resumed at step 4, 8." in sentences(
        tmp_path,
        start(),
        sync(4, 3.0, [1.0, 2.0]),
        start(4, 3.0),
        sync(8, 4.0, [1.0, 2.0]),
        start(8, 4.0),
        sync(12, 5.0, [1.0, 2.0]),
    )


def test_times_of_a_simulation_are_not_shown(tmp_path):
    points = [sync(step, step, [1.0, 2.0]) for step in (4, 8)]
    runs = read_runs([write(tmp_path / "run", [start(backend="simulated"), *points])])
    assert [cell["text"] for cell in table(runs)[0]] == ["1.500", "-", "-", "8", "-", "2", "2.0", "-"]
    names = [picture.name for picture in pictures(runs)]
    assert names == ["loss_steps", "loss_bytes", "drift", "best", "bytes"]


def test_how_far_it_has_come(tmp_path):
    (run,) = read_runs([write(tmp_path, [start(total_steps=40), sync(4, 3.0, [1.0, 2.0])])])
    assert re.fullmatch(r"step 4 of 40, as of \d{4}-\d\d-\d\d \d\d:\d\d UTC", state(run))
    (run,) = read_runs([write(tmp_path, small())])
    assert state(run) == "finished after 12 steps"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (7199, "120.0 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_settings_that_differ_are_marked(tmp_path):
    other = start(swarm={"particles": 2, "sync_mode": "pso", "pso": {"inertia": 0.5}})
    folders = [write(tmp_path / "a", [start()]), write(tmp_path / "b", [other])]
    page = render(read_runs(folders), [])
    rows = {
        row[0].text: (row.get("class"), [cell.text for cell in row[1:]])
        for row in parsed(page).iter("tr")
        if len(row) == 3
    }
    assert rows["swarm.sync_mode"] == ("differ", ["swarm", "pso"])
    assert rows["swarm.pso.inertia"] == ("differ", ["-", "0.5"])
    assert rows["particles"] == (None, ["2", "2"])


# -- the command ------------------------------------------------------------------------------


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    folder = write(tmp_path / "run", [start(), sync(4, 3.0, [2.0, 1.0])])
    assert cli.main(["report", str(folder / "metrics.jsonl"), "--output", str(tmp_path / "new" / "place")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/place/report.html\n"
    assert (tmp_path / "new/place/report.html").exists()
    assert not (folder / "report.html").exists()


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    run = write(tmp_path / "run", small())
    for arguments, said in (
        (["nowhere"], "nowhere: no such run; give a run folder or its metrics.jsonl"),
        ([tmp_path / "empty"], "holds no metrics.jsonl"),
        ([run, tmp_path / "file"], "holds no record of a run"),
        ([run, "--output", tmp_path / "file"], f"{tmp_path}/file: cannot write the report (Not a directory); "),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("ds-pso: error: ")
        assert said in err
    with pytest.raises(SystemExit) as end:
        cli.main(["report"])
    assert end.value.code == 2
