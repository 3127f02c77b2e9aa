"""The objects that exist before the load: created as fast as the server takes them."""

import asyncio
from collections.abc import Sequence

from bench.client import requests
from bench.drive.site import Line, Site
from bench.plan import Object
from bench.values import digest, value
from kvstore.pb import rpc_pb2 as pb

IN_FLIGHT = 64


class PreloadError(Exception):
    """The server refused an object, or the connection to it was lost."""


class Preload:
    """Writes objects over one line, many at a time; their revisions are recorded."""

    def __init__(self, site: Site, objects: Sequence[Object]) -> None:
        self._site = site
        self._objects = objects
        self.line = Line(site)
        self._next = 0
        self._done = 0
        self._over: asyncio.Future[None] = site.loop.create_future()

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Raises ``PreloadError``."""
        self.line.on_up = self._begin
        self.line.up(group)
        try:
            await self._over
        finally:
            self.line.give_up()

    def give_up(self) -> None:
        """Leave the rest."""
        if not self._over.done():
            self._over.set_result(None)

    def _begin(self) -> None:
        for _ in range(min(IN_FLIGHT, len(self._objects) - self._next)):
            self._send()

    def _send(self) -> None:
        number = self._next
        self._next += 1
        key, shape, size, owner = self._objects[number]
        raw = value(run=self._site.run, actor=-1, seq=number, shape=shape, size=size, owner=owner)

        def answered(code: int, message: bytes, text: str) -> None:
            if self._over.done():
                return
            if code:
                self._over.set_exception(PreloadError(f"{key.decode()}: {text} (code {code})"))
                return
            answer = pb.TxnResponse.FromString(message)
            if not answer.succeeded:
                self._over.set_exception(PreloadError(f"{key.decode()} exists already"))
                return
            add = self._site.recorders["preloaded"].add
            add(answer.header.revision, digest(raw), key)
            self._done += 1
            if self._next < len(self._objects):
                self._send()
            elif self._done == len(self._objects):
                self._over.set_result(None)

        message = requests.create(self._site.prefix + key, raw)
        self.line.call(requests.TXN, message, answered)
