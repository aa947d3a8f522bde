"""Letters between particles that wait for nobody: real ones over gloo, and those of a simulation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch import Tensor

from ds_pso.distributed.mailbox import GlooMailbox, Mailbox, Message
from ds_pso.distributed.simulated_world import simulated_world
from ds_pso.distributed.thread_scheduler import ThreadScheduler

PATIENCE_S = 30.0  # longest wait for what should happen at once, on a machine that may be busy


def groups_of(size: int) -> list[Any]:
    """Of every particle its process group, made as ``World.open_mailbox`` makes it; all in this process."""
    store = dist.PrefixStore("messages", dist.HashStore())
    with ThreadPoolExecutor(size) as threads:
        timeout = timedelta(seconds=PATIENCE_S)
        made = [threads.submit(dist.ProcessGroupGloo, store, i, size, timeout) for i in range(size)]
        return [future.result(PATIENCE_S) for future in made]


class Office:
    """The mailboxes of several particles; one that is not opened belongs to a particle that does not receive."""

    def __init__(self, size: int, **options: Any) -> None:
        self.size, self.options = size, options
        self.groups = groups_of(size)
        self.boxes: dict[int, GlooMailbox] = {}

    def open(self, *particles: int) -> list[GlooMailbox]:
        for i in particles:
            self.boxes[i] = GlooMailbox(self.groups[i], i, self.size, **self.options)
        return [self.boxes[i] for i in particles]

    def close(self) -> None:
        """All at once, or each would wait for the goodbyes of the others."""
        self.open(*(i for i in range(self.size) if i not in self.boxes))
        with ThreadPoolExecutor(self.size) as threads:
            list(threads.map(GlooMailbox.close, self.boxes.values()))


MakeOffice = Callable[..., Office]


@pytest.fixture
def office() -> Iterator[MakeOffice]:
    """Makes an office that closes after the test."""
    made: list[Office] = []

    def make(size: int, **options: Any) -> Office:
        made.append(Office(size, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """A mailbox tells nobody that something has come; that is what it is for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "this should have happened long ago"
        time.sleep(0.001)


def deliver(sender: Mailbox, peer: int, index: int, *tensors: Tensor) -> None:
    """Send a message and wait until it has left."""
    sender.send(tensors, index, peer)
    wait_until(lambda: not sender.busy(peer))


def content(message: Message | None) -> tuple[int, int, list[float]] | None:
    return None if message is None else (message.sender, message.index, message.flat.tolist())


# -- which message is kept ---------------------------------------------------------------------


def test_the_newest_message_is_kept_and_an_older_one_never_replaces_it(office: MakeOffice):
    me, second, third = office(3).open(0, 1, 2)
    assert me.newest() is None
    arrived = 0
    for sender, particle, index, kept in [
        (second, 1, 4, (1, 4, [4.0])),
        (third, 2, 7, (2, 7, [7.0])),  # newer, from another
        (second, 1, 5, (2, 7, [7.0])),  # older
        (third, 2, 6, (2, 7, [7.0])),  # older, from the same
        (second, 1, 7, (1, 7, [7.0])),  # of two equally new ones the one that came last
        (second, 1, 8, (1, 8, [8.0])),
    ]:
        deliver(sender, 0, index, torch.tensor([float(index)]))
        arrived += 4
        wait_until(lambda arrived=arrived: me.bytes_received == arrived)
        assert content(me.newest()) == kept, f"after {index} from particle {particle}"
    assert second.newest() is third.newest() is None, "nobody wrote to them"


def test_a_message_that_was_dropped_is_gone_and_only_that_one(office: MakeOffice):
    me, other = office(2).open(0, 1)
    deliver(other, 0, 3, torch.ones(1))
    wait_until(lambda: me.newest() is not None)
    first = me.newest()
    deliver(other, 0, 4, torch.ones(1))
    wait_until(lambda: me.newest() is not first)
    me.drop(first)
    assert me.newest().index == 4, "what came meanwhile stays"
    me.drop(me.newest())
    assert me.newest() is None
    deliver(other, 0, 2, torch.ones(1))
    wait_until(lambda: me.newest() is not None)
    assert me.newest().index == 2, "how old is too old is the rule's business"


# -- what a message holds ----------------------------------------------------------------------


@pytest.mark.parametrize("numel", [0, 1, 15, 16, 17, 32, 1001])
def test_a_message_arrives_whole_in_chunks(office: MakeOffice, numel: int):
    """A chunk is 16 elements: fewer, exactly one or several, and some more."""
    me, other = office(2, chunk_bytes=64).open(0, 1)
    for index in (5, 6):  # the second must not begin with the rest of the first
        values = torch.arange(numel) + 1000.0 * index
        deliver(other, 0, index, values)
        wait_until(lambda index=index: me.newest() is not None and me.newest().index == index)
        assert content(me.newest()) == (1, index, values.tolist())
    assert me.bytes_received == 2 * 4 * numel
    assert other.bytes_received == 0


def test_tensors_of_every_shape_and_precision_arrive_in_order_as_fp32(office: MakeOffice):
    me, other = office(2, chunk_bytes=8).open(0, 1)
    tensors = [
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([], dtype=torch.float32),
        torch.tensor([5.5], dtype=torch.bfloat16),
        torch.tensor(6.0),
        torch.tensor([torch.nan, torch.inf, 2.0**-149]),
    ]
    deliver(other, 0, 0, *tensors)
    wait_until(lambda: me.newest() is not None)
    flat = me.newest().flat
    assert flat.dtype == torch.float32
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.5, 6.0, torch.nan, torch.inf, 2.0**-149])
    assert torch.equal(flat.view(torch.int32), expected.view(torch.int32)), flat


def test_all_write_to_all_at_once(office: MakeOffice):
    size, rounds = 4, 5
    boxes = office(size, chunk_bytes=64).open(*range(size))
    errors = []

    def write(me: int) -> None:
        for index in range(rounds):
            for peer in range(size):
                if peer != me:
                    wait_until(lambda peer=peer: not boxes[me].busy(peer))
                    boxes[me].send([torch.full((100,), 10.0 * index + me)], index, peer)
            message = boxes[me].newest()
            if message is not None and set(message.flat.tolist()) != {10.0 * message.index + message.sender}:
                errors.append((me, content(message)))

    with ThreadPoolExecutor(size) as threads:
        list(threads.map(write, range(size)))
    for box in boxes:
        wait_until(lambda box=box: box.bytes_received == (size - 1) * rounds * 400)
        assert box.newest().index == rounds - 1
    assert not errors, "letters were mixed"


# -- a peer that does not receive -------------------------------------------------------------


def test_a_peer_that_does_not_receive_is_busy_and_holds_up_nobody_else(office: MakeOffice):
    people = office(3)
    me, other = people.open(0, 1)
    assert not me.busy(1)
    assert not me.busy(2)
    me.send([torch.ones(100)], 0, 2)
    for index in range(5):
        deliver(me, 1, index, torch.full((100,), float(index)))
        assert me.busy(2)
    wait_until(lambda: other.newest() is not None and other.newest().index == 4)
    (late,) = people.open(2)
    wait_until(lambda: not me.busy(2))
    wait_until(lambda: late.newest() is not None)
    assert content(late.newest()) == (0, 0, [1.0] * 100), "what was on its way arrives in the end"


def test_a_copy_is_sent(office: MakeOffice):
    people = office(2)
    (me,) = people.open(0)
    state = [torch.ones(3), torch.zeros(2)]
    me.send(state, 1, 1)
    for tensor in state:
        tensor.fill_(7.0)  # training goes on while the message waits
    assert me.busy(1)
    (other,) = people.open(1)
    wait_until(lambda: other.newest() is not None)
    assert content(other.newest()) == (0, 1, [1.0, 1.0, 1.0, 0.0, 0.0])


# -- the end ----------------------------------------------------------------------------------


def mailbox_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_deliver" in thread.name or "_collect" in thread.name}


def test_no_thread_is_left_when_all_have_closed(office: MakeOffice):
    before = mailbox_threads()
    people = office(3)
    people.open(0, 1, 2)
    assert len(mailbox_threads() - before) == 3 * 2 * 2
    deliver(people.boxes[0], 1, 0, torch.ones(5))
    wait_until(lambda: people.boxes[1].newest() is not None)
    people.close()
    assert mailbox_threads() - before == set()
    assert [content(people.boxes[i].newest()) for i in range(3)] == [None, (0, 0, [1.0] * 5), None], "no more letters"


def test_who_remains_goes_on_without_who_has_closed(office: MakeOffice):
    people = office(3)
    first, second, third = people.open(0, 1, 2)
    leaving = threading.Thread(target=second.close)
    leaving.start()
    for index in range(3):
        deliver(first, 2, index, torch.ones(1))
        deliver(third, 0, index, torch.ones(1))
    wait_until(lambda: first.bytes_received == third.bytes_received == 12)
    leaving.join(PATIENCE_S)
    assert not leaving.is_alive()


def close_beside_a_silent_peer(with_message: bool) -> tuple[float, bool]:
    """In a process of its own: threads that wait for a silent peer cannot be ended."""
    people = Office(3)
    me, other = people.open(0, 1)
    if with_message:
        me.send([torch.ones(10)], 0, 2)
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(GlooMailbox.close, [me, other]))
    return time.monotonic() - begin, me.busy(2)


@pytest.mark.parametrize("with_message", [False, True], ids=["nothing to say", "a letter on its way"])
def test_closing_waits_only_a_little_for_a_silent_peer(pool: Pool, with_message: bool):
    ((seconds, busy),) = pool.run(close_beside_a_silent_peer, with_message, world_size=1, timeout=30)
    assert seconds < 15
    assert busy == with_message


def lose_the_peer() -> bool:
    people = Office(2)
    me, _ = people.open(0, 1)
    people.groups[1].abort()  # as when its process dies
    me.send([torch.ones(10)], 0, 1)
    me.close()
    return me.newest() is None


def test_closing_after_a_peer_was_lost(pool: Pool):
    assert pool.run(lose_the_peer, world_size=1, timeout=30) == [True]


# -- in a simulation --------------------------------------------------------------------------


def in_a_room(*bodies: Callable[[Mailbox], Any]) -> list[Any]:
    """Each body gets the mailbox of a particle and runs when it has the turn; what they return."""
    room = ThreadScheduler(len(bodies))
    results: list[Any] = [None] * len(bodies)

    def live(me: int) -> None:
        room.enter(me)
        try:
            results[me] = bodies[me](simulated_world(room, me, PATIENCE_S).open_mailbox())
        except BaseException as error:
            results[me] = error
            room.stop()
        finally:
            room.leave(me)

    threads = [threading.Thread(target=live, args=(me,), daemon=True) for me in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_a_simulated_message_is_there_when_its_sender_has_the_turn_again():
    def first(box: Mailbox) -> Any:
        state = [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0], dtype=torch.bfloat16)]
        assert not box.busy(1)
        box.send(state, 5, 1)  # the other runs up to its own send
        message = box.newest()
        for tensor in state:
            tensor.zero_()
        box.send(state, 6, 1)
        return message

    def second(box: Mailbox) -> Any:
        before = box.newest()
        box.send([torch.zeros(2)], 9, 0)
        assert box.newest() is not before
        box.drop(box.newest())
        assert box.newest() is None
        return before, box.bytes_received

    message, (before, nbytes) = in_a_room(first, second)
    assert content(message) == (1, 9, [0.0, 0.0])
    assert content(before) == (0, 5, [1.0, 2.0, 3.0]), "a copy"
    assert before.flat.dtype == torch.float32
    assert nbytes >= 12


def test_simulated_messages_go_to_whom_they_are_addressed():
    def write_to(peer: int) -> Callable[[Mailbox], Any]:
        def body(box: Mailbox) -> Any:
            box.send([torch.tensor([float(peer)])], 0, peer)
            return content(box.newest())

        return body

    assert in_a_room(write_to(2), write_to(0), write_to(1)) == [
        (1, 0, [0.0]),
        (2, 0, [1.0]),
        (0, 0, [2.0]),
    ]


def test_an_older_simulated_message_never_replaces_a_newer_one():
    def sender_of(index: int) -> Callable[[Mailbox], Any]:
        return lambda box: box.send([torch.zeros(1)], index, 2)

    def reader(box: Mailbox) -> Any:
        return content(box.newest())

    assert in_a_room(sender_of(7), sender_of(5), reader)[2] == (0, 7, [0.0])


def test_all_simulated_messages_that_have_come_are_counted():
    def sender(box: Mailbox) -> Any:
        return box.send([torch.zeros(3)], 0, 2)

    def reader(box: Mailbox) -> int:
        return box.bytes_received

    assert in_a_room(sender, sender, reader)[2] == 24


def test_a_new_simulated_mailbox_is_empty():
    """As a real one, whose connections are new: the messages of an earlier swarm are of another training."""
    room = ThreadScheduler(1)
    earlier, later = (simulated_world(room, 0, PATIENCE_S) for _ in range(2))
    earlier.open_mailbox().send([torch.zeros(3)], 0, 0)
    assert later.open_mailbox().newest() is None


def test_a_damaged_message_is_as_good_as_none(office: MakeOffice) -> None:
    """The next one arrives; and after a header that is damaged nothing can be read any more, and nobody hangs."""
    sender, receiver = office(2).open(0, 1)
    group = sender._group

    class Damaged:
        """Flips a bit of the first tensor of this tag."""

        def __init__(self, tag: int) -> None:
            self.tag = tag

        def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
            if tag == self.tag:
                tensors = [tensors[0].clone()]
                tensors[0].view(torch.uint8)[5] ^= 8
                self.tag = -1
            return group.send(tensors, peer, tag)

    sender._group = Damaged(tag=1)
    deliver(sender, 1, 0, torch.ones(100))
    wait_until(lambda: receiver.bytes_received == 400)
    assert receiver.newest() is None
    deliver(sender, 1, 1, torch.ones(100))
    wait_until(lambda: receiver.newest() is not None)
    assert receiver.newest().index == 1
    sender._group = Damaged(tag=0)
    sender.send([torch.ones(100)], 2, 1)
    wait_until(lambda: sum(thread.is_alive() for thread in receiver._threads) == 1)
    assert receiver.newest().index == 1
