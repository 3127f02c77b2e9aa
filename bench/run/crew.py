"""The generator processes of one repetition, told what to do and listened to."""

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import psutil

ORDER_TIMEOUT = 600.0
"""Seconds for one order, beside the length of the load."""


class CrewError(Exception):
    """A generator process ended, or did not do as it was told; one line."""


class Crew:
    """See ``bench.drive.worker`` for the language that is spoken."""

    def __init__(
        self, folder: Path, parts: int, heard: Callable[[int, Mapping[str, Any]], None]
    ) -> None:
        """``heard`` is told of progress: the part and what it said."""
        self._folder = folder
        self._parts = parts
        self._heard = heard
        self._processes: list[asyncio.subprocess.Process] = []
        self._complaints: list[IO[bytes]] = []
        """What each writes to its stderr: a file, which never fills and blocks it."""
        self._lost: set[int] = set()
        self._cpu_us: dict[int, int] = {}

    @property
    def whole(self) -> bool:
        """Has none ended before it was told to, and its records with it?"""
        return bool(self._processes) and not self._lost

    async def start(self) -> None:
        """Start the processes."""
        for part in range(self._parts):
            complaints = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
            self._complaints.append(complaints)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.drive.worker", str(self._folder), str(part)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=self._complaints[part],
                start_new_session=True,  # a Ctrl-C is the command's to handle
            )
            self._processes.append(process)

    def order(self, do: str, **arguments: object) -> None:
        """Tell all of them."""
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        for process in self._processes:
            if process.stdin is not None and process.returncode is None:
                process.stdin.write(line)

    async def until(self, said: str, seconds: float = ORDER_TIMEOUT) -> list[Mapping[str, Any]]:
        """Wait until each that is left has said so, and give what each said with it.

        Raises ``CrewError``.
        """
        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._listen(part, process, said))
                    for part, process in enumerate(self._processes)
                    if part not in self._lost
                ]
        except TimeoutError as error:
            raise CrewError(f"a generator process has not {said} within {seconds:.0f} s") from error
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _listen(
        self, part: int, process: asyncio.subprocess.Process, said: str
    ) -> Mapping[str, Any]:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            facts: Mapping[str, Any] = json.loads(line)
            if facts["said"] == said:
                return facts
            if facts["said"] == "progress":  # or an answer that nobody waits for any more
                self._heard(part, facts)
        self._lost.add(part)
        self._complaints[part].seek(0)
        complaint = self._complaints[part].read().decode(errors="replace").strip()
        last = complaint.splitlines()[-1] if complaint else "it ended"
        raise CrewError(f"generator process {part}: {last}\n{complaint}")

    def cpu_us(self) -> tuple[int, int]:
        """CPU used so far: by all of them, and by the one that used most."""
        for process in self._processes:
            if process.returncode is None:
                try:
                    times = psutil.Process(process.pid).cpu_times()
                except psutil.Error:
                    continue
                self._cpu_us[process.pid] = int((times.user + times.system) * 1e6)
        return sum(self._cpu_us.values()), max(self._cpu_us.values(), default=0)

    def kill(self) -> None:
        """End all of them at once; what they have not written is lost."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()

    async def end(self) -> None:
        """See all of them off, by force if need be."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                async with asyncio.timeout(30):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        for complaints in self._complaints:
            complaints.close()
