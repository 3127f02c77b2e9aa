"""Leases in the simulation: a lease lives for as long as anyone was told that it would, its keys
end with it, and what is said about it is durable.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.pb import rpc_pb2 as pb
from kvstore.shard import HOME

if TYPE_CHECKING:
    from tests.sim_process import Process
    from tests.sim_requests import Clients


@dataclass
class Lease:
    """A lease that a client has asked for."""

    ttl: int
    """Seconds."""
    floor: float = 0.0
    """It must not end before this time, unless it is revoked."""
    told: bool = False
    """Its grant was acknowledged."""
    revoked: bool = False
    """Somebody has asked for its end."""


class Leases:
    """What ``clients`` know of leases, and ask about them."""

    def __init__(self, clients: "Clients") -> None:
        self.known: dict[int, Lease] = {}
        self._clients = clients
        self._world = clients.world
        self._log = clients.log
        self._random = clients.random

    def some(self, often: float) -> int:
        """One of the last that were granted, or 0: none."""
        if self._random.random() >= often:
            return 0
        told = [number for number, lease in self.known.items() if lease.told]
        return self._random.choice(told[-4:]) if told else 0

    def stored(self, number: int) -> bool:
        """Is it durably there?"""
        return number in self._world.disks[HOME].leases

    def grant(self, process: "Process") -> None:
        """LeaseGrant."""
        request = pb.LeaseGrantRequest(ID=len(self.known) + 1, TTL=self._random.choice([2, 4, 9]))
        lease = self.known[request.ID] = Lease(request.TTL)

        def check(body: bytes) -> int:
            answer = pb.LeaseGrantResponse.FromString(body)
            assert (answer.ID, answer.TTL) == (request.ID, request.TTL)
            if not self.stored(request.ID):
                over = lease.revoked or self._world.clock.now >= sent.at + lease.ttl
                assert over or request.ID in self._log.ended, "granted, so stored"
                self._log.ended.setdefault(request.ID, self._world.clock.now)
            lease.told = True
            lease.floor = max(lease.floor, sent.at + lease.ttl)
            return answer.header.revision

        sent = self._clients.sending(process, check, (), read_only=True)
        self._clients.note("Lease/LeaseGrant", request, sent)

    def revoke(self, process: "Process") -> None:
        """LeaseRevoke."""
        number = self.some(1.0)
        if not number:
            return
        absent = set(process.absent)

        def check(body: bytes) -> int:
            assert not self.stored(number), "its end is durable"
            revision = pb.LeaseRevokeResponse.FromString(body).header.revision
            left = self._log.attached(number, revision)
            away = absent | process.absent  # a shard may have come after it was asked
            assert all(self._world.shards.of(row[2]) in away for row in left), "its keys are gone"
            return revision

        self.known[number].revoked = True
        sent = self._clients.sending(process, check, (), lease=number, read_only=True)
        self._clients.note("Lease/LeaseRevoke", pb.LeaseRevokeRequest(ID=number), sent)

    def renew(self, process: "Process") -> None:
        """LeaseKeepAlive, on a stream of its own."""
        number = self.some(1.0)
        if not number:
            return
        lease = self.known[number]

        def check(body: bytes) -> int:
            answer = pb.LeaseKeepAliveResponse.FromString(body)
            if answer.TTL:
                assert answer.TTL == lease.ttl
                lease.floor = max(lease.floor, sent.at + lease.ttl)
            else:
                over = lease.revoked or self._world.clock.now >= lease.floor
                assert over or not self.stored(number), "it has expired, or its end is durable"
            return answer.header.revision

        sent = self._clients.sending(process, check, (), lease=number, read_only=True)
        self._clients.note("Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest(ID=number), sent)

    def time_to_live(self, process: "Process") -> None:
        """LeaseTimeToLive with keys."""
        number = self.some(1.0)
        if not number:
            return
        absent = set(process.absent)

        def check(body: bytes) -> int:
            answer = pb.LeaseTimeToLiveResponse.FromString(body)
            revision = answer.header.revision
            if answer.TTL < 0:
                assert not self.stored(number), "its end is durable"
                return revision
            assert answer.grantedTTL == self.known[number].ttl >= answer.TTL
            attached = [row[2] for row in self._log.attached(number, revision)]
            of = self._world.shards.of  # a shard may have come after it was asked
            sure = {key for key in attached if of(key) not in absent | process.absent}
            told = list(answer.keys)
            assert told == [key for key in attached if key in told], "what is attached, in order"
            assert sure.issubset(told), f"what {number} has at {revision}"
            return revision

        sent = self._clients.sending(process, check, (), lease=number, read_only=True)
        request = pb.LeaseTimeToLiveRequest(ID=number, keys=True)
        self._clients.note("Lease/LeaseTimeToLive", request, sent)

    def list_all(self, process: "Process") -> None:
        """LeaseLeases."""
        told = {number for number, lease in self.known.items() if lease.told}
        ended = set(self._log.ended)

        def check(body: bytes) -> int:
            answer = pb.LeaseLeasesResponse.FromString(body)
            found = {lease.ID for lease in answer.leases}
            assert not found & ended, "what has ended is not there"
            assert told - set(self._log.ended) <= found <= self.known.keys()
            return answer.header.revision

        sent = self._clients.sending(process, check, (), read_only=True)
        self._clients.note("Lease/LeaseLeases", pb.LeaseLeasesRequest(), sent)

    def check_floors(self) -> None:
        """No lease has ended before its time."""
        for number, ended in self._log.ended.items():
            lease = self.known[number]
            assert lease.revoked or ended >= lease.floor, f"lease {number} ended at {ended}"
