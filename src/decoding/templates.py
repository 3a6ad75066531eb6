"""Chat templates: programs in Jinja, by which the makers of a model write a talk as one text.

chat.py uses it. A template comes from outside, with the weights. jinja2's sandbox keeps it from
Python's own objects and from files. That it may loop for ever, or double a text again and again, no
sandbox prevents. So this file is run as a process of its own, which is ended after some seconds and
gets no more than some memory. Windows and macOS know no such limit of memory.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

LONGEST_TEMPLATE = 1 << 16  # bytes
LONGEST_TEXT = 1 << 24  # characters that a template may write
MEMORY = 1 << 29  # bytes that its process may take
SECONDS = 20  # a talk of 100,000 tokens needs less than one


class Names(Namespace):
    """What a template calls a namespace, without names like __class__, which lead out of it."""

    def __init__(self, **values: object) -> None:
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        """Set a value; Jinja calls it for {% set names.x = ... %}."""
        if name.startswith("_"):
            raise SecurityError(f"a namespace may not have {name!r}")
        super().__setitem__(name, value)


def refuse(message: object) -> None:
    """Raise TemplateError; templates call it raise_exception."""
    raise TemplateError(str(message))


def to_json(value: object, indent: int | None = None) -> str:
    """Write JSON as transformers does; Jinja's own filter would escape what HTML needs escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def expand(template: str, values: Mapping[str, object]) -> str:
    """Return what a template makes of the values, in this process: without limit of time.

    The settings are those of Hugging Face's `transformers`. Raises all kinds of errors.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals = {
        "range": environment.globals["range"],  # which the sandbox limits
        "namespace": Names,
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    text = ""
    for piece in environment.from_string(template).generate(values):
        text += piece
        if len(text) > LONGEST_TEXT:
            raise TemplateError(f"it writes more than {LONGEST_TEXT:,} characters")
    return text


def render(template: str, values: Mapping[str, object]) -> str:
    """Return what a template makes of the values, which JSON has to be able to hold.

    Raises OSError if the template is too long, broken, raises, tries what the sandbox forbids, or
    takes too long.
    """
    if len(template.encode(errors="replace")) > LONGEST_TEMPLATE:
        raise OSError(f"the chat template has more than {LONGEST_TEMPLATE:,} bytes")
    command = [sys.executable, "-P", "-X", "utf8", __file__]  # -P: finds no module in this folder
    request = json.dumps([template, values]).encode()
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise OSError(f"the chat template takes more than {SECONDS} s") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").splitlines() or ["it ended its process"]
        raise OSError(f"the chat template can't be used: {lines[-1]}")
    return done.stdout.decode()


def main() -> int:
    """Expand the template that stdin holds; write the text, or on stderr what is wrong with it."""
    with suppress(ImportError, ValueError, OSError):  # where there is no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    template, values = json.load(sys.stdin)
    try:
        content = expand(template, values).encode()
    except Exception as error:  # a program from outside fails in all ways
        reason = str(error) or f"it needs more than {MEMORY:,} bytes of memory"
        print(" ".join(reason[:300].split()), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
