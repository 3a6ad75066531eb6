"""What several processes need, and a run that a scheduler may stop: translation.py uses it."""

import argparse
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

Result = TypeVar("Result")


def join_processes(device: torch.device) -> None:
    """Let the processes that torchrun has started find each other."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # else all talk by way of the first GPU
    # Encoding the text and testing may take hours in the first; torchrun ends all if one dies.
    dist.init_process_group(timeout=datetime.timedelta(days=7))


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process among those of torchrun, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine: object) -> list[Any]:
    """Return what each of the processes passes, in all of them."""
    everyone = [mine] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, mine)
    return everyone


def by_first(make: Callable[[], Result]) -> Result:
    """Let the first process make something; return it, or raise its OSError, in all of them."""
    made: Any = None
    if rank_and_world()[0] == 0:
        try:
            made = make()
        except OSError as error:
            made = error
    made = gather(made)[0]
    if isinstance(made, OSError):
        raise made
    return made


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another run uses; the lock dies with the process."""
    try:
        lock = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise OSError(f"another run is using {folder}") from None
    with lock:
        yield


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that no step is left half done; a second one ends at once."""
    signals: list[int] = []

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def catch(number: int, frame: object) -> None:
        signals.append(number)
        if not dist.is_initialized():  # torchrun sends its processes a second one by itself
            restore()

    old = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
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
