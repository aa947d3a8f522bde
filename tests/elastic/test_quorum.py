"""Who takes part, who recovers and who donates: decided alike by all from what all have said."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ds_pso.elastic.quorum import ElasticQuorum, QuorumMember


def member(particle: int, index: int = 5, **more: object) -> QuorumMember:
    """As it is in a swarm in which all who have been through as much have been there together."""
    values = {
        "name": f"p{particle}",
        "launcher": "here",
        "attempt": 0,
        "life": 0,
        "run": 1,
        "fresh": False,
        "in_background": False,
        "joined": True,
        "start": 3,
        "waits": True,
        "connected": "",
        "size": 3,
    } | more
    values = {"last": f"quorum {index}"} | values
    return QuorumMember(particle=particle, index=index, store="here:1", model="m", **values)  # type: ignore[arg-type]


members = st.lists(
    st.builds(
        QuorumMember,
        particle=st.integers(0, 5),
        name=st.text("abcdef", min_size=6, max_size=6),
        launcher=st.sampled_from(["", "here", "there"]),
        attempt=st.integers(0, 2),
        life=st.integers(0, 2),
        run=st.integers(0, 2),
        index=st.integers(0, 3),
        last=st.sampled_from("abc"),
        size=st.integers(1, 3),
        fresh=st.booleans(),
        in_background=st.booleans(),
        joined=st.booleans(),
        start=st.just(2),
        waits=st.booleans(),
        connected=st.sampled_from(["", "x"]),
        store=st.just("here:1"),
        model=st.sampled_from("mmmmmn"),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda m: m.name,
)


@given(members)
def test_all_decide_alike_and_somebody_donates(everybody: list[QuorumMember]) -> None:
    quorum = ElasticQuorum.of("1", everybody)
    for order in itertools.islice(itertools.permutations(everybody), 10):
        assert ElasticQuorum.of("1", order) == quorum
    assert quorum.members, "the most advanced always stays"
    assert len(set(quorum.present)) == len(quorum.present)
    assert {m.name for m in quorum.members} | set(quorum.rejected) == {m.name for m in everybody}
    sources = quorum.sources(6)
    assert set(quorum.recovering) < set(quorum.present)
    for particle in quorum.present:
        gives = sources[particle]
        assert gives == particle if particle not in quorum.recovering else gives not in quorum.recovering
    known = [m for m in quorum.members if not m.fresh]
    if known:
        first = max(known, key=lambda m: (m.index, m.size, -m.particle))
        assert set(quorum.recovering) == {m.particle for m in quorum.members if m.fresh or m.last != first.last}


@st.composite
def swarms(draw: st.DrawFn) -> list[QuorumMember]:
    """Members of a running swarm, each started again at times, and some of them behind."""
    return [
        member(
            particle,
            draw(st.integers(3, 5)),
            launcher=draw(st.sampled_from(["here", "there"])),
            attempt=draw(st.integers(0, 3)),
            life=draw(st.integers(0, 3)),
            run=100,
        )
        for particle in draw(st.lists(st.integers(0, 5), min_size=1, max_size=5, unique=True))
    ]


@st.composite
def intruders(draw: st.DrawFn, at_most: int, *, model: st.SearchStrategy[str]) -> list[QuorumMember]:
    """Processes of other models, just started or a swarm of their own that began later; they claim any places."""

    def one(number: int) -> QuorumMember:
        known = {"fresh": True, "run": 0, "index": 0, "last": "", "size": 0, "joined": False}
        if draw(st.booleans()):
            index = draw(st.integers(0, 1000))
            known = {"fresh": False, "run": draw(st.integers(101, 102)), "index": index, "last": "x", "size": 6}
        begun = {name: draw(st.integers(0, 1000)) for name in ("attempt", "life")}
        launcher = draw(st.sampled_from(["", "here", "there", "elsewhere"]))
        found = member(draw(st.integers(0, 5)), name=f"intruder {number}", launcher=launcher, **begun)
        return replace(found, model=draw(model), **known)  # type: ignore[arg-type]

    return [one(number) for number in range(draw(st.integers(1, at_most)))]


@settings(deadline=None)
@given(st.data())
def test_no_intruder_displaces_a_running_swarm(data: st.DataObject) -> None:
    """Up to as many of another model: none takes a place, however often it was started and whenever that was."""
    swarm = data.draw(swarms())
    others = data.draw(intruders(len(swarm), model=st.sampled_from("xy")))
    everybody = data.draw(st.permutations([*swarm, *others]))
    quorum = ElasticQuorum.of("1", everybody)
    assert quorum == replace(ElasticQuorum.of("1", swarm), rejected=quorum.rejected)
    assert len(quorum.members) == len(swarm)
    assert quorum.run == 100
    assert set(quorum.rejected) == {m.name for m in others}
    assert all("its model or config is not that of particle" in why for why in quorum.rejected.values())


@settings(deadline=None)
@given(st.data())
def test_no_number_of_newcomers_displaces_who_runs(data: st.DataObject) -> None:
    swarm = data.draw(swarms())
    others = data.draw(intruders(12, model=st.just("x")))
    newcomers = [replace(m, fresh=True, run=0, index=0, size=0) for m in others]
    quorum = ElasticQuorum.of("1", data.draw(st.permutations([*swarm, *newcomers])))
    assert [m.name for m in quorum.members] == sorted(m.name for m in swarm)
    assert set(quorum.rejected) == {m.name for m in newcomers}


@settings(deadline=None)
@given(st.data())
def test_another_launcher_takes_no_place_in_which_somebody_runs(data: st.DataObject) -> None:
    """Of the same model; only what one launcher has started can be put in order."""
    swarm = data.draw(swarms())
    taken = {m.particle: m for m in swarm}
    begun = {name: data.draw(st.integers(0, 1000)) for name in ("attempt", "life")}
    place = data.draw(st.sampled_from(sorted(taken)))
    newcomer = member(place, 0, name="newcomer", launcher="elsewhere", fresh=True, run=0, size=0, **begun)
    quorum = ElasticQuorum.of("1", data.draw(st.permutations([*swarm, newcomer])))
    assert [m.name for m in quorum.members] == sorted(m.name for m in swarm)
    assert "another launcher's process runs in its place" in quorum.rejected["newcomer"]


def test_who_is_started_again_by_its_launcher_takes_its_place_back() -> None:
    """The lighthouse may still hold what the process before has asked, or the same process under another name."""
    for newer in ({"attempt": 1, "life": 0}, {"attempt": 0, "life": 3}):
        old = member(1, index=9, name="old", attempt=0, life=2)
        quorum = ElasticQuorum.of("1", [member(0), member(1, 0, name="new", fresh=True, **newer), old])
        assert [m.name for m in quorum.members] == ["p0", "new"]
        assert "has started it again" in quorum.rejected["old"]


def test_of_two_that_are_started_in_one_place_all_choose_the_same() -> None:
    new = [member(0, 0, name=name, launcher=name, fresh=True, run=0) for name in ("a", "b")]
    assert ElasticQuorum.of("1", new) == ElasticQuorum.of("1", new[::-1])
    assert len(ElasticQuorum.of("1", new).members) == 1


def test_a_swarm_keeps_the_time_at_which_it_began() -> None:
    start = ElasticQuorum.of("1", [member(i, 0, fresh=True, run=0) for i in range(2)], created=7)
    assert start.run == 7
    later = [member(0, run=7), member(1, run=7), member(2, 0, fresh=True, run=0)]
    assert ElasticQuorum.of("2", later, created=8).run == 7


def test_the_model_of_the_most_advanced_counts() -> None:
    quorum = ElasticQuorum.of("1", [replace(member(0), model="other"), member(1, index=6), member(2)])
    assert quorum.present == (1, 2)
    assert "not that of particle 1" in quorum.rejected["p0"]


def test_the_model_of_most_counts() -> None:
    """However far one that runs with another has come."""
    quorum = ElasticQuorum.of("1", [member(0), member(1), replace(member(2, index=9), model="other")])
    assert quorum.present == (0, 1)
    assert list(quorum.rejected) == ["p2"]


def test_a_new_swarm_waits_for_enough() -> None:
    def waits(*them: tuple[int, bool]) -> bool:
        new = [member(i, 0, fresh=True, start=start, waits=waits) for i, (start, waits) in enumerate(them)]
        return ElasticQuorum.of("1", new).waits_for_more

    assert waits((3, True), (3, True))
    assert not waits((3, True), (3, True), (3, True))
    assert not waits((3, True), (3, False)), "one has lost its patience"
    assert not waits((2, True), (3, True)), "one of them was told that two are enough"
    assert not ElasticQuorum.of("1", [member(0, start=3), member(1, 0, fresh=True, start=3)]).waits_for_more


def test_connections_are_kept_if_all_have_the_same() -> None:
    def connected(*numbers: str) -> str:
        return ElasticQuorum.of("1", [member(i, connected=number) for i, number in enumerate(numbers)]).connected

    assert connected("7", "7") == "7"
    assert connected("7", "8") == connected("7", "") == ""


def test_donors_take_turns() -> None:
    quorum = ElasticQuorum.of("1", [member(0, 7), member(1, 3), member(2, 7), member(3, 0, fresh=True), member(4, 6)])
    assert quorum.recovering == (1, 3, 4)
    assert quorum.sources(5) == (0, 0, 2, 2, 0)


def test_who_synced_alone_gives_way_to_those_who_synced_together() -> None:
    """Both have counted a sync point; their states are not the same."""
    quorum = ElasticQuorum.of("1", [member(0, last="alone", size=1), member(1, size=2), member(2, size=2)])
    assert quorum.recovering == (0,)
    assert set(quorum.sources(3)[:1]) <= {1, 2}


def test_late_work_may_count() -> None:
    members = [member(0, 7), member(1, 5), member(2, 0, fresh=True)]
    quorum = ElasticQuorum.of("1", members, late_counts=True)
    assert (quorum.recovering, quorum.overdue, quorum.donors) == ((2,), (1,), [0])
    assert quorum.sources(3) == (0, 1, 0)
    assert ElasticQuorum.of("1", members).recovering == (1, 2)
    # What comes from the particle's own disk alone is no work of this swarm.
    from_disk = [member(0, 7), member(1, 5, joined=False)]
    assert ElasticQuorum.of("1", from_disk, late_counts=True).recovering == (1,)


def test_at_a_start_all_take_the_state_of_the_first() -> None:
    quorum = ElasticQuorum.of("1", [member(2, 0, fresh=True), member(1, 0, fresh=True), member(4, 0, fresh=True)])
    assert quorum.is_start
    assert quorum.sources(5) == (0, 1, 1, 3, 1)


def test_who_trains_on_cannot_sync_with_who_waits() -> None:
    assert ElasticQuorum.of("1", [member(0), member(1, in_background=True)]).is_mixed
    assert not ElasticQuorum.of("1", [member(0, in_background=True), member(1, in_background=True)]).is_mixed
