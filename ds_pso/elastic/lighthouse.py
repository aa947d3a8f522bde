"""A particle's line to torchft's lighthouse: heartbeats, and requests for a quorum.

Of torchft only the lighthouse and its client are used. Its ``Manager`` would also open a port on every network that
ends the process when asked to, and send checkpoints over one that hands them to everybody.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
import uuid
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

from ds_pso.elastic.config import ElasticConfig
from ds_pso.elastic.quorum import ElasticQuorum, QuorumMember
from ds_pso.errors import ConfigError, PeerError

_SLICE_S = 2.0
_PAUSE_S = 0.3
_LIVES = itertools.count()  # of all clients of this process

log = logging.getLogger(__name__)


class Standing(Protocol):
    """A function of a particle's name and of whether it still waits for more to begin; returns its standing."""

    def __call__(self, name: str, *, waits: bool) -> QuorumMember: ...


class QuorumClient:
    """The line of one particle; lives in its first rank.

    Args:
        url: of the lighthouse.
        timeout_s: longest wait for the others, and for a step of this particle before it counts as stalled.
    """

    def __init__(
        self,
        url: str,
        particle: int,
        options: ElasticConfig,
        timeout_s: float,
    ) -> None:
        self._url = url
        self._particle = particle
        self._options = options
        self._timeout_s = timeout_s
        self._client_type = _import_client()
        self._client: Any = None
        self._was_lost = False  # the lighthouse
        self._refusal = ""  # its last one
        self._unknown = ""  # what is wrong where it serves others than particles
        self._rename()
        self._known: set[int] = {particle}
        self._refused = False  # the swarm has sent this particle away
        self._alive = self._heard = time.monotonic()  # of this particle; of the lighthouse
        self._first_request_s = math.inf
        self._stop = threading.Event()

    def heartbeat(self) -> None:
        """Note that the particle gets on with its work."""
        self._alive = time.monotonic()

    @property
    def is_stalled(self) -> bool:
        """True if the particle has taken no step for so long that the others shall go on without it."""
        return time.monotonic() - self._alive > self._timeout_s

    def close(self) -> None:
        """Send no more heartbeats."""
        self._stop.set()

    def request_quorum(self, standing: Standing, *, fresh: bool) -> ElasticQuorum:
        """Wait for those that will come.

        Args:
            standing: what this particle says of itself.
            fresh: whether it has just been started. Then it waits until the others come, however long they train.

        Raises:
            PeerError: too few came within the timeout, or the lighthouse is gone, or the swarm has sent this particle
                away.
        """
        options, begin = self._options, time.monotonic()
        self._refused = False
        self._let_others_wait(begin)
        patience = self._timeout_s if options.straggler == "wait" else options.straggler_s
        # The lighthouse waits for stragglers from the oldest request on. A particle that waits for the next sync of the
        # others, because it has just been started or has missed one, requests again and again: else the first of them
        # to come would go on without those a moment later.
        short = min(_SLICE_S, patience / 4)
        slice_s = short if fresh else patience + short
        deadline = begin + patience + 2 * options.heartbeat_s
        self._refusal, self._heard = "no answer", begin
        while True:
            self._check_lighthouse()
            self.heartbeat()
            left = deadline - time.monotonic()
            if left <= 0 and not fresh and self._has_been_heard():
                break
            waits = time.monotonic() - self._first_request_s < self._timeout_s
            try:
                quorum = self._request(
                    standing(self.name, waits=waits), slice_s if fresh else min(slice_s, max(0.1, left))
                )
            except TimeoutError:
                slice_s = short
                continue
            except (RuntimeError, ConnectionError, OSError) as error:
                self._refusal = str(error).splitlines()[0][:200]
                log.info("particle %d: the lighthouse refused: %s", self._particle, self._refusal)
                self._client, self._was_lost = None, True
                time.sleep(_PAUSE_S)
                continue
            self._heard = time.monotonic()
            why = quorum.rejected.get(self.name, self._unknown if quorum.is_start else "")
            if why:
                self._refused = True  # nobody shall wait for it
                raise PeerError(f"particle {self._particle}: {why}", agreed=True)
            if len(quorum.members) >= options.min_particles and not quorum.waits_for_more:
                self._known.update(quorum.present)
                return quorum
            # There are too few, and more may be on their way.
            deadline = begin + self._timeout_s + 2 * options.heartbeat_s
            if time.monotonic() >= deadline and not quorum.waits_for_more:
                break
            time.sleep(_PAUSE_S)
        return self._without_others(standing, begin)

    def _let_others_wait(self, now: float) -> None:
        """Begin to send heartbeats, at the first request."""
        if self._first_request_s == math.inf:
            self._first_request_s = now
            threading.Thread(target=self._beat, daemon=True, name="ds_pso heartbeat").start()

    def _without_others(self, standing: Standing, begin: float) -> ElasticQuorum:
        """Return a quorum of one, if the config allows it.

        Raises:
            PeerError: it does not.
        """
        self._rename()
        if self._options.min_particles > 1:
            raise PeerError(
                f"particle {self._particle}: fewer than swarm.elastic.min_particles = {self._options.min_particles} "
                f"came to the sync point within {time.monotonic() - begin:.0f} s; so far there were "
                f"{sorted(self._known)}. Look at the logs of the others, or lower it",
                agreed=True,
            )
        return self._quorum(f"{self.name}-{time.time_ns()}", [standing(self.name, waits=False)])

    def _check_lighthouse(self) -> None:
        if time.monotonic() - self._heard > max(self._timeout_s, 2 * self._options.heartbeat_s):
            self._rename()
            raise PeerError(
                f"particle {self._particle}: the lighthouse at {self._url} does not answer ({self._refusal}); look "
                "whether it runs and can be reached from here",
                agreed=True,
            )

    def _has_been_heard(self) -> bool:
        """True if the lighthouse has answered, or taken a heartbeat, just now."""
        return time.monotonic() - self._heard <= self._options.heartbeat_s

    def _request(self, mine: QuorumMember, timeout_s: float) -> ElasticQuorum:
        if self._client is None:
            self._client = self._client_type(self._url, timedelta(seconds=min(timeout_s, 5.0)))
            if self._was_lost:
                # It knows of nobody yet: a request at once would leave out those not heard of yet.
                time.sleep(self._options.heartbeat_s / 2)
                self._was_lost = False
        answer = self._client.quorum(
            self.name,
            timedelta(seconds=timeout_s),
            address=mine.store,
            store_address=mine.store,
            step=mine.index,
            world_size=1,
            shrink_only=False,
            data=asdict(mine),
        )
        everybody, self._unknown = [], ""
        for participant in answer.participants:
            try:
                everybody.append(QuorumMember(**participant.data))
            except TypeError:
                self._unknown = (
                    f"the lighthouse at {self._url} also serves another version of ds_pso, or another program "
                    f"({participant.replica_id[:60]}); install one version everywhere, and give each swarm a "
                    "lighthouse of its own (ds-pso launch --port)"
                )
        seconds, nanos = answer.created.seconds, answer.created.nanos
        return self._quorum(f"{seconds}.{nanos:09d}", everybody, created=10**9 * seconds + nanos)

    def _quorum(self, number: str, everybody: list[QuorumMember], *, created: int = 0) -> ElasticQuorum:
        late_counts = self._options.straggler == "async"
        return ElasticQuorum.of(number, everybody, created=created, late_counts=late_counts)

    def _beat(self) -> None:
        client: Any = None
        while not self._stop.wait(self._options.heartbeat_s / 4):
            client = self._beat_once(client)

    def _beat_once(self, client: Any) -> Any:
        """Send a heartbeat, unless the others shall go on; return the connection, None if there is none."""
        if self._refused or self.is_stalled:
            return client
        with contextlib.suppress(TimeoutError, RuntimeError, ConnectionError, OSError):
            client = client or self._client_type(self._url, timedelta(seconds=5))
            client.heartbeat(self.name, timedelta(seconds=min(5.0, self._options.heartbeat_s / 2)))
            self._heard = time.monotonic()
            return client
        return None

    def _rename(self) -> None:
        """Become a new process, as far as the others can tell: what is left of a request must not make a quorum."""
        self.name, self.life = f"particle_{self._particle}:{uuid.uuid4().hex[:12]}", next(_LIVES)


def _import_client() -> Any:
    try:
        from torchft.coordination import LighthouseClient
    except ImportError as error:
        raise ConfigError(
            f'swarm.transport = "elastic": torchft cannot be imported ({error}); install ds_pso[elastic]'
        ) from error
    return LighthouseClient
