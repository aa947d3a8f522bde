"""Checkpoints at an address: complete or not there, whatever is cut short, and nothing but files of a checkpoint."""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from ds_pso.checkpoint import fetching, finish_uploads
from ds_pso.checkpoint.format import FORMAT, record_checksum
from ds_pso.checkpoint.uploading import begin_upload
from ds_pso.checkpoint.writer import complete, prune, write_part
from ds_pso.distributed.coordinator import StoreCoordinator
from ds_pso.distributed.layout import Layout
from ds_pso.distributed.membership import StaticMembership
from ds_pso.errors import CheckpointError
from ds_pso.session.uploads import Uploads
from ds_pso.utils.background_task import Background
from ds_pso.utils.remote_folder import RemoteFolder, check_address

ADDRESS = "memory://run"
Tree = dict[str, bytes]


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def run_of(address: str | None = ADDRESS, known: int = 0, timeout_s: float = 20.0) -> Any:
    """What the modules here know of a session, on the only rank of a swarm."""
    layout = Layout(0, 1, 1)
    coordinator = StoreCoordinator(layout, timeout_s, Background())
    world = SimpleNamespace(
        layout=layout, coordinator=coordinator, membership=StaticMembership(layout, coordinator), is_leader=True
    )
    config = SimpleNamespace(remote_checkpoints=address, timeout_s=timeout_s)
    return SimpleNamespace(config=config, world=world, uploads=Uploads(known), is_leader=True, particle=0)


def made(folder: Path, step: int, content: str = "") -> Path:
    """A complete checkpoint of one rank on disk."""
    name = f"step_{step:08d}"
    temporary = folder / f".{name}.tmp"
    files = [
        temporary / "particle_0/deepspeed/mp_rank_00_model_states.pt",
        temporary / "particle_0/model/config.json",
        temporary / "particle_0/zero_to_fp32.py",
    ]
    for path in [*files, temporary / "swarm/any"]:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in files:
        path.write_text(f"{path.name} of step {step} {content}")
    record: Any = {"format": FORMAT, "step": step, "num_particles": 1, "particle_size": 1}
    write_part(temporary, 0, record, {"rule.0.velocity": torch.full((3,), float(step))}, files)
    complete(temporary, folder / name)
    return folder / name


def upload(run: Any, checkpoint: Path, keep: int | None = None) -> None:
    begin_upload(run, run.world.coordinator, checkpoint, keep)
    run.uploads.wait(60)
    assert run.uploads.on_its_way is None


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resumed(folder: Path, address: str = ADDRESS) -> tuple[str, Tree]:
    """What a run in that folder resumes from."""
    name = fetching.newest(run_of(address), folder, reshape=False)
    return name, tree(folder / name)


def stored() -> list[str]:
    return sorted(name.removeprefix("/run/") for name in MemoryFileSystem.store)


# -- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_there_and_back(tmp_path: Path, scheme: str) -> None:
    address = ADDRESS if scheme == "memory" else f"file://{tmp_path}/far away/run"
    old, new = made(tmp_path / "a", 2), made(tmp_path / "a", 4)
    run = run_of(address)
    upload(run, old)
    upload(run, new)
    assert resumed(tmp_path / "b", address) == ("step_00000004", tree(new))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["latest", "step_00000004"]
    assert resumed(tmp_path / "b", address) == ("step_00000004", tree(new)), "it is there now"


def test_the_newer_one_counts(tmp_path: Path) -> None:
    upload(run_of(), made(tmp_path / "a", 4, "of the store"))
    made(tmp_path / "b", 2)
    made(tmp_path / "c", 4, "of the disk")
    made(tmp_path / "d", 6)
    assert b"of the store" in resumed(tmp_path / "b")[1]["particle_0/model/config.json"]
    assert b"of the disk" in resumed(tmp_path / "c")[1]["particle_0/model/config.json"]
    assert resumed(tmp_path / "d")[0] == "step_00000006"


def test_a_damaged_one_on_disk_comes_again(tmp_path: Path) -> None:
    made(tmp_path, 2)
    new = made(tmp_path, 4)
    truth = tree(new)
    upload(run_of(), new)
    (new / "particle_0/model/config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not passed over
        assert resumed(tmp_path) == ("step_00000004", truth)


def test_one_that_is_named(tmp_path: Path) -> None:
    run = run_of()
    old, new = made(tmp_path / "a", 2), made(tmp_path / "a", 4)
    upload(run, old)
    upload(run, new)
    for name in ("step_00000002", "step_00000003", "../step_00000002", "latest"):
        fetching.fetch_named(run, tmp_path / "b", name, reshape=False)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["step_00000002"], "latest does not go back"
    assert tree(tmp_path / "b/step_00000002") == tree(old)


def test_one_that_is_named_and_damaged_comes_again(tmp_path: Path) -> None:
    run, name = run_of(), "step_00000002"
    old = made(tmp_path / "a", 2)
    upload(run, old)
    fetching.fetch_named(run, tmp_path / "b", name, reshape=False)
    (tmp_path / "b" / name / "particle_0/model/config.json").write_text("damaged")
    fetching.fetch_named(run, tmp_path / "b", name, reshape=False)
    assert tree(tmp_path / "b" / name) == tree(old)


def test_an_empty_address_is_said(tmp_path: Path) -> None:
    made(tmp_path, 2)
    with pytest.warns(UserWarning, match=r"memory://run: holds no checkpoint; resuming from .* alone"):
        assert resumed(tmp_path)[0] == "step_00000002"


def test_nothing_anywhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        resumed(tmp_path)


# -- cut short ----------------------------------------------------------------------------------------


class Killed(OSError):
    pass


def cut(monkeypatch: pytest.MonkeyPatch, after: int, *, half: bool) -> list[str]:
    """Let everything that changes the store fail after so many times, the first one half done or not at all."""
    done: list[str] = []

    def limited(name: str) -> Callable[..., Any]:
        real = getattr(MemoryFileSystem, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if len(done) < after:
                done.append(f"{name} {args[-1] if name == 'put_file' else args[0]}")
                return real(self, *args, **options)
            if half and len(done) == after:
                done.append("half")
                if name == "put_file":
                    content = Path(args[0]).read_bytes()
                    pipe(self, args[1], content[: len(content) // 2])
                elif name == "pipe_file":
                    pipe(self, args[0], args[1][: len(args[1]) // 2])
            raise Killed("killed")

        return call

    pipe, remove = MemoryFileSystem.pipe_file, MemoryFileSystem.rm_file
    for name in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, limited(name))
    assert remove is not MemoryFileSystem.rm_file
    return done


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["new", "the same step again"])
def test_every_prefix_of_an_upload(tmp_path: Path, again: bool, half: bool) -> None:
    """It is the checkpoint before, or the new one, to the last bit; and the next upload mends all."""
    old = made(tmp_path / "a", 2)
    if again:
        first = made(tmp_path / "b", 4, "the first time")
    new, last = made(tmp_path / "a", 4), made(tmp_path / "a", 6)
    truth = {"step_00000002": tree(old), "step_00000004": tree(new)}
    seen: list[str] = []
    for after in range(100):
        MemoryFileSystem.store.clear()
        run = run_of()
        upload(run, old)
        if again:
            upload(run, first)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = cut(patch, after, half=half)
            upload(run, new, keep=1)
        folder = tmp_path / f"resumed {after}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if half else "error")  # nothing counts as one that is none
            name, found = resumed(folder)
        if not (again and after == 0):  # nothing was touched: that of the first time
            assert found == truth[name], done
        seen.append(name)
        upload(run_of(known=4), last, keep=1)
        assert resumed(folder) == ("step_00000006", tree(last))
        assert {name.split("/")[0] for name in stored()} == {"latest", "step_00000006.json", "step_00000006"}
        if len(done) < after:
            break
    assert len(seen) > 8
    begun = 1 if again else 0
    assert sorted(seen[begun:]) == seen[begun:], "once it is there it stays"
    assert {*seen} == {*truth}


def test_the_first_upload_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = made(tmp_path / "a", 4)
    cut(monkeypatch, 3, half=True)
    with pytest.warns(UserWarning, match=r"memory://run/step_00000004: not uploaded \(.*killed\); "):
        upload(run_of(), new)
    assert stored()
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        resumed(tmp_path / "b")


# -- damaged, and made up -----------------------------------------------------------------------------


def two(tmp_path: Path) -> Tree:
    """Steps 2 and 4 at the address; the files of 2."""
    run = run_of()
    old, new = made(tmp_path / "a", 2), made(tmp_path / "a", 4)
    upload(run, old)
    upload(run, new)
    return tree(old)


def change(name: str, edit: Callable[[bytes], bytes]) -> None:
    remote = RemoteFolder(ADDRESS)
    remote.write(name, edit(remote.read(name)))


def manifest_of(change_files: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Somebody has written a manifest of these files, whose checksum is right."""

    def edit(text: bytes) -> bytes:
        manifest = json.loads(text)
        del manifest["checksum"]
        manifest["files"] = change_files(manifest["files"])
        return json.dumps({**manifest, "checksum": record_checksum(manifest)}).encode()

    return edit


MODEL, MANIFEST = "step_00000004/particle_0/deepspeed/mp_rank_00_model_states.pt", "step_00000004.json"
DAMAGE: dict[str, tuple[Callable[[], None], str]] = {
    "bit flip": (lambda: change(MODEL, lambda text: text[:-1] + bytes([text[-1] ^ 1])), "checksum differs"),
    "cut": (lambda: change(MODEL, lambda text: text[:-1]), "bytes instead of"),
    "gone": (lambda: RemoteFolder(ADDRESS).remove(MODEL), "missing"),
    "manifest cut": (lambda: change(MANIFEST, lambda text: text[:-9]), "damaged"),
    "manifest edited": (lambda: change(MANIFEST, lambda text: text.replace(b": 4", b": 5")), "checksum differs"),
    "manifest is another JSON": (lambda: change(MANIFEST, lambda _: b"[1]"), "checksum differs"),
    "manifest without sizes": (lambda: change(MANIFEST, manifest_of(list)), "no sizes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str) -> None:
    truth = two(tmp_path)
    damage, text = DAMAGE[name]
    damage()
    with pytest.warns(UserWarning, match=f"memory://run/step_00000004.*{text}.*; looking for an older checkpoint"):
        assert resumed(tmp_path / "b") == ("step_00000002", truth)
    with pytest.raises(CheckpointError, match=f"{text}.*; name another checkpoint"):
        fetching.fetch_named(run_of(), tmp_path / "c", "step_00000004", reshape=False)
    assert not list((tmp_path / "c").iterdir())


STRANGE = [
    *("../evil.pt", "/etc/evil.pt", "particle_0/../../evil.pt", "particle_0//evil.pt", "particle_0/./evil.pt"),
    *("swarm/rank_00000.pkl", "particle_0/evil.pkl", "particle_0/evil.py", "particle_0/.evil.pt", "evil.pt"),
    *("particle_0\\evil.pt", "particle_0/evil.pt\n", "particle_x/evil.pt", "swarm/../particle_0/evil.pt"),
    *("latest", "", "particle_0/\u00e9vil.pt"),
]


@pytest.mark.parametrize("name", STRANGE)
def test_only_files_of_a_checkpoint_are_fetched(tmp_path: Path, name: str) -> None:
    truth = two(tmp_path)
    change(MANIFEST, manifest_of(lambda files: {name: [4, "0"], **files}))
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        get = RemoteFolder.get
        patch.setattr(RemoteFolder, "get", lambda self, file, target: (asked.append(file), get(self, file, target)))
        with pytest.warns(UserWarning, match="is no file of a checkpoint"):
            assert resumed(tmp_path / "b") == ("step_00000002", truth)
    assert not [file for file in asked if not file.startswith("step_00000002/")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_that_could_not_come_back_is_not_uploaded(tmp_path: Path) -> None:
    new = made(tmp_path, 4)
    record = new / "swarm/rank_00000.json"
    content = json.loads(record.read_text())
    del content["checksum"]
    content["files"]["particle_0/notes.txt"] = [1, "0"]
    record.write_text(json.dumps({**content, "checksum": record_checksum(content)}))
    with pytest.warns(UserWarning, match="not uploaded .*notes.txt"):
        upload(run_of(), new)
    assert stored() == []


# -- whose it is, and which stay ----------------------------------------------------------------------


def test_what_is_of_another_run_stays(tmp_path: Path) -> None:
    upload(run_of(), made(tmp_path / "a", 4))
    before = dict(MemoryFileSystem.store)
    for step in (2, 6):
        with pytest.warns(UserWarning, match="it holds step_00000004 of another run; resume from that"):
            upload(run_of(), made(tmp_path / "b", step), keep=1)
    assert before == MemoryFileSystem.store


@pytest.mark.parametrize("keep", [None, 2])
def test_going_back(tmp_path: Path, keep: int | None) -> None:
    """A run that has resumed at 2 leaves 4 and 6 behind, as soon as it saves; also if that is cut short."""
    run = run_of()
    for step in (2, 4, 6):
        upload(run, made(tmp_path / "a", step))
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 3, half=False)
        with pytest.warns(UserWarning, match="not uploaded"):
            upload(run_of(known=2), made(tmp_path / "b", 3), keep)
    assert resumed(tmp_path / "c")[0] == "step_00000002"
    upload(run_of(known=2), made(tmp_path / "b", 3), keep)
    assert resumed(tmp_path / "d")[0] == "step_00000003"
    there = {f"step_{step:08d}.json" for step in ((2, 3) if keep else (2, 3, 4, 6))}
    assert {name for name in stored() if "/" not in name} == {"latest", *there}


def test_old_ones_go_and_nothing_else(tmp_path: Path) -> None:
    run = run_of()
    for name in ("notes.txt", "model/config.json", "step_1/x", "step_00000003/particle_0/half.pt"):
        RemoteFolder(ADDRESS).write(name, b"x")
    for step in (2, 4, 6):
        upload(run, made(tmp_path, step), keep=2)
    there = {name.split("/")[0] for name in stored()}
    steps = {f"step_{step:08d}" for step in (4, 6)}
    assert there == {"latest", "notes.txt", "model", "step_1", *steps, *(f"{name}.json" for name in steps)}


# -- beside training ----------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Uploads wait until it is set."""
    event, put = threading.Event(), RemoteFolder.put

    def wait(self: RemoteFolder, source: Path, name: str) -> None:
        event.wait(30)
        put(self, source, name)

    monkeypatch.setattr(RemoteFolder, "put", wait)
    return event


def test_the_newest_of_those_passed_over_follows(tmp_path: Path, gate: threading.Event) -> None:
    run, names = run_of(), []
    for step in (2, 4, 6):
        new = made(tmp_path / "a", step)
        prune(new, 1, run.uploads.on_its_way)
        begin_upload(run, run.world.coordinator, new, 1)
        names.append(sorted(path.name for path in (tmp_path / "a").glob("step_*")))
    assert names[1:] == [["step_00000002", "step_00000004"], ["step_00000002", "step_00000006"]]
    assert stored() == []
    gate.set()
    finish_uploads(run)
    assert resumed(tmp_path / "b") == ("step_00000006", tree(new))
    assert {name.split("/")[0] for name in stored()} == {"latest", "step_00000006.json", "step_00000006"}


def test_the_end_does_not_wait_for_ever(tmp_path: Path, gate: threading.Event) -> None:
    run = run_of(timeout_s=0.2)
    begin_upload(run, run.world.coordinator, made(tmp_path, 2), None)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"step_00000002: the upload was not complete 0.2 s after training"):
        finish_uploads(run)
    assert time.monotonic() - begin < 10
    gate.set()
    run.uploads.wait(30)


def test_a_rank_that_still_uploads_does_not_let_the_others_wait_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose upload has ended wait for it, for as long, in what begins the upload that follows."""
    run, waited = run_of(timeout_s=8.0), []
    monkeypatch.setattr(run.uploads, "wait", waited.append)
    finish_uploads(run)
    run.uploads.passed_over = (Path("step_00000002"), None)
    monkeypatch.setattr("ds_pso.checkpoint.uploading.begin_upload", lambda *_: None)
    finish_uploads(run)
    assert waited[:2] == [8.0, 4.0]


def test_a_step_that_is_saved_anew_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is given up, and what it would have made old stays."""
    run, put = run_of(), RemoteFolder.put
    old = made(tmp_path / "a", 2)
    upload(run, old)

    def save_anew(self: RemoteFolder, source: Path, name: str) -> None:
        put(self, source, name)
        monkeypatch.setattr(RemoteFolder, "put", put)
        made(tmp_path / "a", 4, "anew")

    monkeypatch.setattr(RemoteFolder, "put", save_anew)
    first = made(tmp_path / "a", 4)
    with pytest.warns(UserWarning, match="step_00000004: was saved anew meanwhile"):
        upload(run, first, 1)
    assert resumed(tmp_path / "b") == ("step_00000002", tree(old))
    upload(run, first, 1)
    assert resumed(tmp_path / "c") == ("step_00000004", tree(first))
    assert b"anew" in tree(first)["particle_0/model/config.json"]


def test_without_an_address_nothing_happens(tmp_path: Path) -> None:
    run, new = run_of(None), made(tmp_path, 2)
    begin_upload(run, None, new, 1)  # type: ignore[arg-type]
    finish_uploads(run)
    fetching.fetch_named(run, tmp_path, "step_00000009", reshape=False)
    assert fetching.newest(run, tmp_path, reshape=False) == "step_00000002"


@pytest.mark.parametrize("error", [PermissionError("no credentials"), RuntimeError("of the library")], ids=repr)
def test_a_store_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    new = made(tmp_path, 2)
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    with pytest.warns(UserWarning, match=rf"step_00000002: not uploaded \(.*{error}.*the next one will be tried"):
        upload(run_of(), new)
    with pytest.raises(CheckpointError, match=rf"cannot be fetched \({error}\); .* remove swarm.remote_checkpoints"):
        resumed(tmp_path)


# -- the address --------------------------------------------------------------------------------------


def test_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("memory://run", "file:///tmp/run", "local:///tmp/run"):
        check_address(address)
    for address in ("", "run", "/tmp/run", "s3:/bucket", "s3://", "://run", "nosuch://run", "memory://"):
        with pytest.raises(ValueError, match="must be an address that fsspec knows, such as s3://bucket/run"):
            check_address(address)

    def missing(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"must have its library installed \(Install s3fs to access S3\): pip install"):
        check_address("s3://bucket/run")


def test_the_files_of_all_ranks_for_another_number_of_them(tmp_path: Path) -> None:
    new = made(tmp_path / "a", 2)
    upload(run_of(), new)
    shutil.rmtree(tmp_path / "a")
    assert fetching.newest(run_of(), tmp_path / "b", reshape=True) == "step_00000002"
    assert len(tree(tmp_path / "b/step_00000002")) == 5
