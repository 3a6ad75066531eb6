"""Tools of translation.py for several processes, and for runs that a job scheduler may stop."""

import argparse
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
import torch.distributed.nn  # imported later, it would keep the process group and its threads
from filelock import FileLock, Timeout

Result = TypeVar("Result")


def own_store(store: dist.Store, rank: int, world: int) -> dist.Store:
    """Return a part of torchrun's store in which only processes of this start can write.

    torchrun keeps its store when it starts processes again, with the addresses of the dead ones.
    So the others ask the first one for the name of the part. Each question is new, and so its
    answer can't be an old one.
    """
    if rank > 0:
        question = uuid4().hex
        store.set(f"question of {rank}", question)
        name = store.get(question).decode()  # waits for the answer
        store.set(f"{name} is known to {rank}", "")
        return dist.PrefixStore(name, store)
    name, others = uuid4().hex, range(1, world)
    while not all(store.check([f"{name} is known to {other}"]) for other in others):
        for other in others:  # the question found first may be that of a dead process
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
    timeout = datetime.timedelta(minutes=10)  # after that, one is lost
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = own_store(store, rank, world)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
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
    soon if the first process or its machine is lost.
    """
    if not dist.is_initialized():
        return make()
    made: list[Any] = []  # the result, once it is there

    def work() -> None:
        try:
            made.append(make())
        except Exception as error:
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
    if isinstance(news[0][0], Exception):
        raise news[0][0]
    return news[0][0]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another run uses; the lock dies with the first process."""
    if rank_and_world()[0] > 0:
        yield
        return
    try:
        lock = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise OSError(f"another run is using {folder}") from None
    with lock:
        yield


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collect signals to stop, so that no step is left half done; a second one ends at once.

    These are Ctrl-C, SIGTERM, and SIGHUP, which a terminal sends as it closes; nohup ignores that.
    """
    signals: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if os.name == "posix" and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        signals.append(number)
        if not dist.is_initialized():  # torchrun sends its processes a second one by itself
            restore()

    old = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield signals
    finally:
        restore()


def usable_device(name: str) -> torch.device:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    if name != "cpu" and "LOCAL_RANK" in os.environ:  # a GPU for each process, and no other
        name = f"{name.partition(':')[0]}:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None
    return torch.device(name)
