"""A particle's line to the lighthouse: when it says that it lives, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from pool import Pool

from ds_pso.elastic import lighthouse
from ds_pso.elastic.config import ElasticConfig
from ds_pso.elastic.lighthouse import QuorumClient
from ds_pso.elastic.quorum import QuorumMember
from ds_pso.errors import PeerError
from elastic.test_quorum import member

URL = "http://127.0.0.1:1"


class Line:
    """In place of torchft's client: keeps what it was told, and answers at once.

    Attributes:
        others: what the data of other participants say.
        heartbeats: the names that gave one.
    """

    others: tuple[dict[str, object] | None, ...] = ()

    def __init__(self, *_: object) -> None:
        self.heartbeats: list[str] = []

    def heartbeat(self, name: str, *_: object) -> None:
        self.heartbeats.append(name)

    def quorum(self, name: str, *_: object, data: dict[str, object], **__: object) -> Any:
        participants = [SimpleNamespace(replica_id=f"{d}", data=d) for d in (data, *self.others)]
        return SimpleNamespace(participants=participants, created=SimpleNamespace(seconds=7, nanos=5))


def client_of(patch: Callable[[object, str, object], None], clock: Callable[[], float]) -> QuorumClient:
    """A client of particle 0 that talks to a ``Line``, at the time of ``clock``."""
    patch(lighthouse, "_import_client", lambda: Line)
    patch(lighthouse, "time", SimpleNamespace(monotonic=clock, sleep=lambda _: None, time_ns=lambda: 1))
    client = QuorumClient(URL, 0, ElasticConfig(heartbeat_s=3600), timeout_s=10.0)
    patch(client, "_beat", lambda: None)  # no thread: the test itself asks for heartbeats
    return client


def beat_at(times: list[float], steps: set[float]) -> list[int]:
    """Heartbeats so far at each time, with a step of the main thread at some of them; timeout_s = 10."""
    now = [0.0]
    client, line, found = client_of(setattr, lambda: now[0]), Line(), []
    for now[0] in times:
        if now[0] in steps:
            client.heartbeat()
        client._beat_once(line)
        found.append(len(line.heartbeats))
    return found


def test_a_stalled_main_thread_ends_the_heartbeat(pool: Pool) -> None:
    """The thread that sends it lives on; the others must not wait for a particle that takes no step."""
    (found,) = pool.run(beat_at, [1.0, 9.0, 11.0, 60.0, 61.0, 72.0], {61.0}, world_size=1)
    assert found == [1, 2, 2, 2, 3, 3]


def ask(client: QuorumClient, *, fresh: bool) -> Any:
    def standing(name: str, *, waits: bool) -> QuorumMember:
        values = {"fresh": fresh, "start": 1, "run": 0 if fresh else 3, "size": 0 if fresh else 1}
        return replace(member(0, 0 if fresh else 5), name=name, life=client.life, waits=waits, **values)  # type: ignore[arg-type]

    return client.request_quorum(standing, fresh=fresh)


def test_who_is_sent_away_gives_no_more_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who run would wait for it at every sync, while it saves or waits for its user."""
    client = client_of(monkeypatch.setattr, lambda: 0.0)
    client._beat_once(line := Line())
    assert len(line.heartbeats) == 1
    monkeypatch.setattr(Line, "others", (asdict(replace(member(1), model="another")),))
    with pytest.raises(PeerError, match=r"^particle 0: its model or config is not that of particle 1"):
        ask(client, fresh=True)
    client._beat_once(line)
    assert len(line.heartbeats) == 1
    monkeypatch.setattr(Line, "others", ())
    ask(client, fresh=True)  # with the model of the others
    client._beat_once(line)
    assert len(line.heartbeats) == 2


@pytest.mark.parametrize("stranger", [None, {"particle": 1, "born": 5}], ids=["no particle", "another version"])
def test_no_swarm_begins_beside_one_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, stranger: dict[str, object] | None
) -> None:
    """Half of the machines with another version would train a swarm of their own; who runs lets nobody disturb it."""
    client = client_of(monkeypatch.setattr, lambda: 0.0)
    monkeypatch.setattr(Line, "others", (stranger,))
    with pytest.raises(PeerError, match=r"also serves another version of ds_pso, or another program"):
        ask(client, fresh=True)
    assert ask(client, fresh=False).present == (0,)
    monkeypatch.setattr(Line, "others", (stranger, asdict(member(1))))
    assert ask(client, fresh=True).recovering == (0,)


def test_a_process_counts_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has asked under an earlier one may still lie with the lighthouse."""
    client = client_of(monkeypatch.setattr, lambda: 0.0)
    before = client.name, client.life
    client._rename()
    assert client.name != before[0]
    assert client.life > before[1]
    assert client_of(monkeypatch.setattr, lambda: 0.0).life > client.life
