"""Run a function in a process of its own, with limits, so that no answer can harm practice.py.

judge.py and practice.py use it. On Linux, the process is forked from one that has imported all
libraries already. A guard starts it, waits for it, and says how it ended; the two have a session of
their own, and all processes in it are killed at the end. Elsewhere a process starts afresh.
"""

import contextlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from exercises.holes import ROOT, SOURCES

FORK = sys.platform == "linux"  # elsewhere the libraries do not all survive it
MEMORY = 4 * 2**30  # bytes
IMPORT_SECONDS = 120  # of computing, that a library may take to be imported
SLOW = "torch._dynamo"  # which the first optimizer of a process imports

Send = Callable[[object], None]


@dataclass
class Ended:
    """What a process sent, and how it ended."""

    sent: list[Any] = field(default_factory=list)
    status: int | None = None  # the negative number of the signal that ended it; None: unknown
    late: bool = False  # whether it was ended because its time was over
    left_processes: bool = False  # whether processes that it had started went on


def run(function: Callable[..., None], *arguments: object, seconds: float) -> Ended:
    """Call `function(send, *arguments)` in a process; return what it sent, and how it ended.

    `seconds` are those of a clock. Raises RuntimeError if the function raises anything.
    """
    context: Any = multiprocessing.get_context("fork" if FORK else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    target = guard if FORK else call
    process = context.Process(target=target, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    ended = Ended()
    try:
        receive(receiver, process, time.monotonic() + seconds, ended)
        ended.late = process.is_alive()
        ended.left_processes = FORK and not ended.late and goes_on(process)
    finally:
        kill(process)
    if not FORK:
        ended.status = process.exitcode
    return ended


def receive(receiver: Connection, process: BaseProcess, deadline: float, ended: Ended) -> None:
    """Take what a process sends until it ends or its time is over."""
    alive = True
    while alive and time.monotonic() < deadline:
        alive = process.is_alive()  # asked first: what was sent before its end is still received
        with contextlib.suppress(EOFError):
            while receiver.poll(0.02):
                kind, content = pickle.loads(receiver.recv_bytes())
                if kind == "error":
                    raise RuntimeError(content)
                if kind == "status":
                    ended.status = content
                else:
                    ended.sent.append(content)


def goes_on(process: BaseProcess) -> bool:
    """Return whether a process that has ended left others that don't end within ten seconds."""
    for _ in range(500):
        try:
            os.killpg(process.pid or 0, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def kill(process: BaseProcess) -> None:
    """End a process, and all that it has started."""
    if FORK:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


def guard(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call a function in a child process, and send how that ends."""
    os.setsid()
    child = os.fork()
    if child == 0:
        call(sender, function, arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    sender.send_bytes(pickle.dumps(("status", os.waitstatus_to_exitcode(status))))


def call(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call a function in this process, and send what it sends, or the error that it raises."""
    mine = os.getpid()

    def send(content: object) -> None:
        if os.getpid() == mine:  # not from a process that an answer forked
            sender.send_bytes(pickle.dumps(("sent", content)))

    silence()
    limit_memory()
    try:
        function(send, *arguments)
    except BaseException:
        if os.getpid() == mine:
            sender.send_bytes(pickle.dumps(("error", traceback.format_exc())))


def silence() -> None:
    """Let this process read nothing and print nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def limit_memory() -> None:
    """Let this process have MEMORY at most."""
    with contextlib.suppress(ImportError, ValueError):  # not on Windows; or the limit is lower
        import resource

        highest = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, highest))


def forget_sources() -> None:
    """Let the tests, the lessons and the rooms be imported anew."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        of_a_lesson = SOURCES in file.parents and file.parent != Path(__file__).parent
        if of_a_lesson or file.parent == ROOT / "tests":
            del sys.modules[name]


def limit_computing(seconds: float) -> None:
    """Let this process compute for so many seconds from now on, without counting slow imports."""
    with contextlib.suppress(ImportError, ValueError):
        import resource

        highest = resource.getrlimit(resource.RLIMIT_CPU)[1]
        until = round(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (until, highest))
        if SLOW not in sys.modules:
            sys.meta_path.insert(0, SlowImport(until))


class SlowImport(importlib.abc.MetaPathFinder):
    """Imports a library that takes seconds, and doesn't count them against the limit."""

    def __init__(self, until: float) -> None:
        self.until = until  # in seconds that this process has computed

    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the slow library only, and set the limit anew before its import and after."""
        if name != SLOW:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module
        before = time.process_time()

        def execute_uncounted(module: Any) -> None:
            limit_computing(IMPORT_SECONDS)
            execute(module)
            limit_computing(self.until - before)

        spec.loader.exec_module = execute_uncounted  # type: ignore[method-assign]
        return spec
