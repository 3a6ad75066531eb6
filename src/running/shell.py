"""What a script needs besides PyTorch: options that all have, one-line errors, files kept whole.

The lessons from transformer.py on use it, and so do practice.py and the explorer.
"""

import argparse
import errno
import functools
import io
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

Arguments = ParamSpec("Arguments")
Model = TypeVar("Model", bound=nn.Module)
BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Stopped(Exception):
    """A signal has stopped a run, which has saved what it needs to continue."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.status = 128 + number


def command(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
    """Make a `main` end as a person expects: no traceback for what a person can cause.

    `main` returns the exit status. Ctrl-C gives 130, SIGTERM 143 if it has stopped a run, and a
    closed pipe, as with `| head`, 141. An OSError, a loss that isn't finite and a lack of memory
    give 1, and one line that says what is wrong.
    """

    @functools.wraps(main)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook, nor if stdout is closed
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        if sys.stderr is None:  # progress bars need one
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            try:
                return main(*arguments, **options)
            finally:
                print(end="", flush=True)  # here at the latest, a closed pipe is noticed
        except KeyboardInterrupt:
            return 130
        except Stopped as stopped:
            return stopped.status
        except BrokenPipeError:
            silence_stdout()
            return 141
        except (OSError, FloatingPointError, RuntimeError, MemoryError) as error:
            reason = printable(error)
            if isinstance(error, RuntimeError):
                if not lacks_memory(error):
                    raise
                reason = first_line(error)  # the others say where in PyTorch it was
            print(f"{Path(sys.argv[0]).name}: {reason or 'not enough memory'}", file=sys.stderr)
            if getattr(error, "errno", None) == errno.ENOSPC:  # perhaps of stdout itself
                silence_stdout()
            return 1

    return run


def silence_stdout() -> None:
    """Send to nowhere what Python would still try to print at its exit."""
    with suppress(AttributeError, OSError):  # where stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lacks_memory(error: RuntimeError) -> bool:
    """Return whether PyTorch raised this for want of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate" in str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, fit to be printed."""
    return printable(str(error).partition("\n")[0])


def printable(text: object) -> str:
    """Return text with ? for all that could steer a terminal; spaces and joiners stay."""

    def steers(character: str) -> bool:
        kind = unicodedata.category(character)
        return kind in ("Cc", "Cs", "Zl", "Zp") or character in BIDIRECTIONAL

    return "".join("?" if steers(character) else character for character in str(text))


def typed_lines() -> Iterator[str]:
    """Yield the lines that a person types, until Ctrl-D or Ctrl-C, or those of a pipe.

    Empty ones are passed over, and those that are not UTF-8 refused.
    """
    if sys.stdin is None:  # closed
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    on_terminal = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if on_terminal:
        with suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  (keys to edit a line, and to find earlier ones)
    try:
        while True:
            line = input("> " if on_terminal else "")
            if not is_utf8(line):
                print("that line is not UTF-8", file=sys.stderr)
            elif line.strip():
                yield line
    except EOFError:
        if on_terminal:
            print()
    except KeyboardInterrupt:
        if not on_terminal:
            raise
        print()


def is_utf8(text: str) -> bool:
    """Return whether a text from outside holds no byte that isn't UTF-8."""
    return not any(unicodedata.category(character) == "Cs" for character in text)


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all have: --seed, --device, --out (runs/NAME)."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    about = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, formatter_class=formatter)
    add = parser.add_argument
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--seed", type=number(0, 2**63 - 1), default=0, help="fixes every random choice")
    add("--device", type=usable_device, default=device, help="where to compute")
    add("--out", type=folder, default=Path("runs", name), help="for the results")
    return parser


def folder(name: str) -> Path:
    """Parse --out; not every library can open a file whose name is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("must be a name in UTF-8") from None
    return Path(name)


def existing_folder(text: str) -> Path:
    """Parse --data."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}")
    return Path(text)


def existing_path(text: str) -> Path:
    """Parse --data of a script that also takes a file."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"must be a folder or a file, got {text!r}")
    return Path(text)


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from `low` to `high`, which are whole if `low` is."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = type(low)(text)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be between {low:,} and {high:,}")

    return parse


def usable_device(name: str) -> torch.device:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    if name != "cpu" and "LOCAL_RANK" in os.environ:  # a GPU for each process, and no other
        name = f"{name.partition(':')[0]}:{torch.distributed.get_node_local_rank()}"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = f"{name!r} can't be used here: {first_line(error)}"
        raise argparse.ArgumentTypeError(reason) from None
    return torch.device(name)


def write(path: Path, content: bytes, before: Path | None = None) -> None:
    """Write a file beside `path`, then rename it, so that a crash never leaves a partial file.

    What stood at `path` takes the name `before`, if there is one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            path.replace(before)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def clear_parts(path: Path) -> None:
    """Delete what killed processes left of a file; no other process may be writing it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.part")
    for part in path.parent.iterdir():
        if name.fullmatch(part.name):
            part.unlink()


@contextmanager
def refusing(path: Path, message: str) -> Iterator[None]:
    """Turn every error into an OSError: a broken or foreign file fails in many ways."""
    try:
        yield
    except Exception as error:
        no_memory = isinstance(error, RuntimeError) and lacks_memory(error)
        if no_memory or isinstance(error, MemoryError):  # says nothing of the file
            raise
        known = isinstance(error, OSError | ValueError)
        reason = first_line(error) if known else "it is broken, or from another script"
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        raise OSError(f"{message}: {path}: {reason}") from error


def checksum(weights: dict[str, Tensor]) -> str:
    """Return a CRC-32 of tensors, in the order of their names."""
    crc = 0
    for name in sorted(weights):
        numbers = weights[name].cpu().contiguous().flatten()
        crc = zlib.crc32(numbers.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_weights(path: Path, model: nn.Module, about: dict[str, str]) -> None:
    """Save a network, what its file should say about it, and a checksum, as safetensors."""
    weights = model.state_dict()
    write(path, safetensors.torch.save(weights, about | {"crc32": checksum(weights)}))


def read_weights(
    path: Path, expected: Callable[[dict[str, str]], dict[str, Tensor]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_weights` saved: the weights, and what the file says about them.

    `expected` makes tensors of the shapes that are expected of such a file. They are compared
    before anything is read, so that no file can ask for more memory than its own size. Raises
    OSError or ValueError if the file is broken or another's, or holds numbers that are not finite.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a plain file")
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata() or {}
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if expected:
            wanted = {name: tuple(tensor.shape) for name, tensor in expected(about).items()}
            if shapes != wanted:
                raise ValueError("its weights have other sizes than its settings require")
        weights = {name: file.get_tensor(name) for name in names}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("some of its weights are not finite")
    if "crc32" in about and about["crc32"] != checksum(weights):
        raise ValueError("it is broken: its checksum is wrong")
    return weights, about


def open_weights(
    path: Path, make: Callable[[dict[str, str]], Model]
) -> tuple[Model, dict[str, str]]:
    """Open a saved network; return it and the metadata, from which `make` makes the network.

    Raises OSError if the file is missing, broken, or another network's.
    """

    def expected(about: dict[str, str]) -> dict[str, Tensor]:
        with torch.device("meta"):  # takes no memory, whatever the file says
            return make(about).state_dict()

    with refusing(path, "not a model saved by this script; train one first"):
        weights, about = read_weights(path, expected)
        model = make(about)
        model.load_state_dict(weights)
    return model, about
