"""Tools of translation.py for several processes, and for runs that a job scheduler may stop."""

import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.nn  # before DDP does: its functions keep a group that exists by then
from filelock import FileLock, Timeout

Result = TypeVar("Result")
LOST = datetime.timedelta(minutes=10)  # a process that is silent for so long is lost


def own_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a section of torchrun's key-value store that only the processes of this start use.

    When torchrun restarts processes, it keeps the store, and the addresses of the dead ones stay in
    it. So the first process makes up a name for a section, and the others ask it for that name.
    Each question has a random key, so that no earlier answer is taken for this one's. Raises
    TimeoutError if a process is lost.
    """
    if rank > 0:
        question = uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(question).decode()  # waits for the answer
        store.set(f"{name} is known to {rank}", "")
    else:
        name = uuid4().hex
        end = time.monotonic() + LOST.total_seconds()
        while not all(store.check([f"{name} is known to {other}"]) for other in range(1, world)):
            if time.monotonic() > end:
                raise TimeoutError("a process was lost before all had started")
            for other in range(1, world):  # the question may still be that of a dead process
                store.set(store.get(f"question of {other}").decode(), name)
            time.sleep(0.1)
    return dist.PrefixStore(name, store)


@contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """Connect the processes that torchrun has started, if it has; disconnect them at the end.

    After an error, they are not disconnected: some may be waiting for others.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # else all communicate via the first GPU
    store, rank, world = next(dist.rendezvous("env://", timeout=LOST))
    store = own_store(store, rank, world)
    # gloo sends objects, such as those of by_first, even if the gradients are on GPUs.
    backends = {"cpu": "gloo", device.type: dist.get_default_backend_for_device(device)}
    names = ",".join(map(":".join, backends.items()))
    dist.init_process_group(names, store=store, rank=rank, world_size=world, timeout=LOST)
    yield
    # Ends the group's threads, too: at Python's exit, they could abort the process.
    dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process among those of torchrun, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine: object) -> list[Any]:
    """Return to every process the list of the objects that the processes pass."""
    everyone = [mine] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def by_first(make: Callable[[], Result]) -> Result:
    """Let the first process make something; return it, or raise its error, in all of them.

    The others hear once a minute that it isn't done. So they can wait for hours, and yet notice
    within ten minutes if the first process or its machine is lost.
    """
    if not dist.is_initialized():
        return make()
    made: list[Any] = []  # the result, once it is there

    def work() -> None:
        try:
            made.append(make())
        except BaseException as error:  # the others must hear of every one
            made.append(error)

    thread = threading.Thread(target=work, daemon=True)
    if dist.get_rank() == 0:
        thread.start()
    while True:
        if dist.get_rank() == 0:
            thread.join(timeout=60)
        news = [[*made]]
        dist.broadcast_object_list(news)
        if news[0]:
            break
    if isinstance(news[0][0], BaseException):
        raise news[0][0]
    return news[0][0]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another run uses; the lock dies with the first process."""
    lock = FileLock(folder / "lock", thread_local=False)  # by_first may work in a thread

    def acquire() -> None:
        lock.acquire(timeout=0)

    try:
        by_first(acquire)
    except Timeout:
        raise OSError(f"another run is using {folder}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collect signals to stop, so that no step is left half done.

    These are Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends as it closes; nohup ignores that.
    A second one ends a process at once, unless it is one of several.
    """
    signals: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if os.name == "posix" and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)

    old: dict[int, Any] = {}  # the handlers before

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        signals.append(number)
        if not dist.is_initialized():  # else one may come from the scheduler and one from torchrun
            restore()

    try:
        for number in numbers:
            old[number] = signal.getsignal(number)
            signal.signal(number, catch)
        yield signals
    finally:
        restore()
