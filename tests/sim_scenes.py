"""What chance hardly brings about in the simulation, and is therefore put on now and then."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvstore.kv import prefix_end
from kvstore.shard import HOME
from tests.sim_process import Process
from tests.sim_requests import ALL
from tests.sim_world import SimDisk

if TYPE_CHECKING:
    from tests.sim import Simulation


@contextmanager
def calm(disks: list[SimDisk]) -> Iterator[None]:
    """Nothing goes wrong on some databases."""
    rates = [disk.rate for disk in disks]
    for disk in disks:
        disk.rate = 0.0
    try:
        yield
    finally:
        for disk, rate in zip(disks, rates, strict=True):
            disk.rate = rate


def overtake(simulation: "Simulation", process: Process) -> None:
    """A compaction overtakes a write that waits for the value which it has replaced."""
    world, clients, run = simulation.world, simulation.clients, simulation._run
    disk = world.random.choice(world.disks)
    keys = [row[2] for row in world.log.range(*ALL, world.log.tip)]
    keys = [key for key in keys if world.shards.of(key) == disk.number]
    if not keys or not _is_well(simulation, process):
        return
    with calm(world.disks):
        run(process, world.disks, rounds=4)
        if process.over:
            return
        process.evict()
        late = disk.late_reads = deque[Callable[[], None]]()
        put = clients.put(process, world.random.choice(keys))
        run(process, world.disks, rounds=2)
        if late and process.serving and not put.call.done:
            clients.compact(process, world.log.tip)
            run(process, world.disks, rounds=4)
            simulation.counts["overtaken"] += 1
        disk.late_reads = None
        for read in late:
            read()
        if not process.over:
            run(process, world.disks, rounds=2)


def leave(simulation: "Simulation", process: Process) -> None:
    """A shard is away when the server starts anew, leases end meanwhile, and it returns."""
    world, clients, run = simulation.world, simulation.clients, simulation._run
    leased = [row[2] for row in world.log.range(*ALL, world.log.tip) if row[5]]
    numbers = sorted({world.shards.of(key) for key in leased} - {HOME})
    if not numbers or not _is_well(simulation, process):
        return
    away = world.disks[world.random.choice(numbers)]
    with calm(world.disks):
        away.fall()
        process = _anew(simulation, process)
        away.rise()
        if world.random.random() < 0.5 and not process.over:
            process = _anew(simulation, process)
        if not process.over:
            run(process, world.disks, rounds=20)
        if process.serving and not process.absent:
            clients.read(process, *ALL)
            run(process, world.disks, rounds=2)
            simulation.counts["returned to fewer leases"] += 1


def reroute(simulation: "Simulation", process: Process) -> None:
    """Two shards take each other's keys while they still have what a compaction has left behind,
    and the process that has written one of them anew dies before that is gone.
    """
    world, clients, run = simulation.world, simulation.clients, simulation._run
    if len(world.routes) < 2 or not _is_well(simulation, process):
        return
    with calm(world.disks):
        run(process, world.disks, rounds=4)
        for prefix in world.routes:
            clients.put(process, prefix + b"a")
            run(process, world.disks, rounds=2)
            clients.delete(process, prefix, prefix_end(prefix))
            run(process, world.disks, rounds=2)
        clients.put(process, b"a")
        run(process, world.disks, rounds=2)
        clients.compact(process, world.log.tip)
        run(process, world.disks[:1], rounds=2)
        if not process.serving:
            return
        world.reroute()
        process = _replaced(simulation, process)
        if not process.serving:
            world.reroute()
            simulation.counts["rerouting refused"] += 1
            return
        prefix, owner = world.random.choice(list(world.routes.items()))
        clients.put(process, prefix + b"a")
        run(process, [world.disks[HOME], world.disks[owner]], rounds=2)
        if process.serving:
            _replaced(simulation, process)
            simulation.counts["rerouted"] += 1


def _replaced(simulation: "Simulation", process: Process) -> Process:
    """A process dies, and the next one has just begun to serve, or has been refused."""
    simulation._bury(process)
    simulation._start()
    process = simulation.processes[-1]
    for number in range(4_000):
        if process.serving or process.over:
            break
        if not number % 40:
            simulation._tick(0.15)
        process.run_next()
        for disk in simulation.world.disks:
            disk.step()
    return process


def _anew(simulation: "Simulation", process: Process) -> Process:
    """A process dies; the next one, when it has lived for longer than leases do."""
    simulation.counts["crashes"] += 1
    simulation._bury(process)
    simulation._start()
    process = simulation.processes[-1]
    for _ in range(30):
        if not process.over:
            simulation._tick(1.0)
            simulation._run(process, simulation.world.disks, rounds=2)
    return process


def _is_well(simulation: "Simulation", process: Process) -> bool:
    """Is this process alone, and nothing in its way?"""
    disks = simulation.world.disks
    wrong = any(disk.down or disk.frozen or disk.right is not None for disk in disks)
    return process.serving and not (len(simulation.processes) > 1 or process.paused or wrong)
