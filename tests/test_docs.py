"""The pages are true: their commands, outputs, code, links and pictures."""

import ast
import importlib
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import diagrams
from running.processes import catching_signals
from test_gpt import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def blocks(text, language):
    """Return the fenced blocks of a language; outputs have none."""
    fences = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for found, content in fences if found == language]


def in_pages(pattern):
    """Return what a pattern finds, with the page."""
    return sorted(
        {
            (page, *match.groups())
            for page, text in PAGES.items()
            for match in re.finditer(pattern, text)
        }
    )


def named(value):
    return value.name if isinstance(value, Path) else None


COMMANDS = [
    line for text in PAGES.values() for block in blocks(text, "sh") for line in block.splitlines()
]
RUNS = sorted(
    {c[c.index("src/") :] for c in COMMANDS if c.startswith("poetry run") and "src/" in c}
)


def chapter(number):
    """Return the text of a chapter."""
    (page,) = (ROOT / "docs").glob(f"{number}-*.md")
    return PAGES[page]


def heading_names(text):
    """Return the names by which GitHub links to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def skeleton(line):
    """Return the words of a line, with # for every number."""
    return NUMBER.sub("#", " ".join(line.split()))


def numbers(lines):
    return [float(number.replace(",", "")) for number in NUMBER.findall("\n".join(lines))]


def assert_printed(block, printed):
    """Assert that the lines of the block were printed one after the other, with these numbers."""
    wanted = block.splitlines()
    found = [skeleton(line) for line in printed]
    shape = [skeleton(line) for line in wanted]
    starts = [i for i in range(len(found)) if found[i : i + len(shape)] == shape]
    assert starts, f"not printed:\n{block}"
    tries = [numbers(printed[start : start + len(shape)]) for start in starts]
    assert any(pytest.approx(numbers(wanted), rel=0.02, abs=0.011) == now for now in tries)


@pytest.mark.parametrize(
    ("page", "code"),
    [
        (page, code)
        for page, text in PAGES.items()
        for code in blocks(text, "python")
        if not code.startswith('"""')  # a whole script, which test_runs.py runs
    ],
    ids=named,
)
def test_quoted_code_stands_in_a_script(page, code):
    assert any(code in script for script in SCRIPTS.values())


@pytest.mark.parametrize(("page", "target"), in_pages(r"\]\((?!http)([^)]+)\)"), ids=named)
def test_a_link_leads_somewhere(page, target):
    path, _, heading = target.partition("#")
    found = (page.parent / path).resolve() if path else page
    assert found.is_file()
    if heading and not re.fullmatch(r"L\d+", heading):
        assert heading in heading_names(PAGES[found])


@pytest.mark.parametrize(
    ("page", "name", "path", "line"),
    in_pages(r"\[`?((?!\w+\.py\b)[\w.]+)`?\]\(((?:\.\./)?src/.*?)#L(\d+)\)"),
    ids=named,
)
def test_a_link_to_a_line_leads_to_the_definition_of_its_name(page, name, path, line):
    found = (page.parent / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert re.match(rf" *(def|class) {name.rpartition('.')[2]}\b", found)


@pytest.mark.parametrize("number", range(1, 7))
def test_the_lines_to_read_are_whole_functions(number):
    text = " ".join(chapter(number).split())
    first, last, script, begin, names = re.search(
        r"Read lines (\d+)\D(\d+) of \[([\w.-]+)\]\(\.\./src/\3#L(\d+)\), (.*?);", text
    ).groups()
    assert first == begin
    body = ast.parse(SCRIPTS[script]).body
    lines = {node.name: (node.lineno, node.end_lineno) for node in body if hasattr(node, "name")}
    start, *_, end = re.findall(r"\w+(?=[`\]])", names) * 2
    assert (lines[start][0], lines[end][1]) == (int(first), int(last))


@pytest.mark.parametrize("command", RUNS)
def test_a_command_can_be_given(command, capsys):
    script, *arguments = shlex.split(command.split(" < ")[0])
    assert os.access(ROOT / script, os.X_OK)
    with pytest.raises(SystemExit):
        importlib.import_module(Path(script).stem).main(["--help"])
    print(end="", flush=True)
    flags = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert {argument for argument in arguments if argument.startswith("--")} <= {*flags}


@pytest.mark.parametrize(("page", "target"), in_pages(r"(?:`|\n)make ([a-z0-9-]+)"), ids=named)
def test_a_target_that_is_named_exists(page, target):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_make_bench_can_run_every_benchmark():
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert os.access(path, os.X_OK)
        needed = re.findall(r"add_argument\(\"[^-]", path.read_text(encoding="utf-8"))
        assert not needed, f"{path.name} can't be run without arguments"


@pytest.mark.parametrize(("page", "picture"), in_pages(r"!\[[^]]+\]\((.*?)\)"), ids=named)
def test_a_picture_is_drawn_by_make_docs_or_by_hand(page, picture):
    path = (page.parent / picture).resolve().relative_to(ROOT)
    recipe = re.search(r"^docs:.*?\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    drawn = re.search(rf"(runs/\S+ |--out ){re.escape(str(path))}$", recipe, re.MULTILINE)
    of_a_browser = path.name.startswith("explore-")
    by_hand = path.suffix == ".svg" and path.stem not in diagrams.DIAGRAMS
    by_code = path.stem in diagrams.DIAGRAMS and "docs/diagrams.py\n" in recipe
    assert drawn or of_a_browser or by_hand or by_code


@pytest.mark.parametrize("number", range(1, 7))
def test_a_chapter_has_the_skeleton(number):
    text = chapter(number)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = [
        "The idea",
        "The formula",
        "The code",
        "Run it",
        "Change and watch",
        "What goes wrong",
        "Your turn",
        "Next",
    ]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert "**You will be able to**" in text
    assert re.search(r"!\[[^]]+\]\(", text.partition("## The idea")[0])


def test_hello_prints_what_its_chapter_says(capsys):
    (output,) = blocks(chapter(1), "")
    importlib.import_module("pytorch-hello").main(["--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("PyTorch ")
    assert_printed(output.partition("\n")[2], printed)


def test_what_the_readme_prints_stands_in_a_chapter():
    outputs = [block for block in blocks(PAGES[ROOT / "README.md"], "") if block[0] != "✗"]
    printed = {
        line for n in range(1, 7) for block in blocks(chapter(n), "") for line in block.splitlines()
    }
    assert len(outputs) >= 3
    for output in outputs:
        assert {*output.splitlines()} <= printed


def test_attention_prints_what_its_chapter_says(capsys, tmp_path):
    outputs = blocks(chapter(3), "")
    attention = importlib.import_module("attention")
    attention.main(["--device", "cpu", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    begins = [output.partition(" ")[0] for output in outputs]
    assert begins == ["Why", "QKᵀ/√d_k", "Why"]
    for output in outputs:
        if output.startswith("Why positions"):  # trained for longer, so only in form
            wanted = {skeleton(line) for line in output.partition("  head 1")[0].splitlines()}
            assert wanted - {""} <= {skeleton(line) for line in printed}
        else:
            for part in output.strip().split("\n\n"):
                assert_printed(part, printed)


def test_fashion_mnist_prints_lines_of_its_chapters_kind(capsys, tmp_path):
    table = next(b for b in blocks(chapter(2), "") if b.startswith("epoch"))
    fashion = importlib.import_module("fashion-mnist")
    fashion.main(["--sample", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path)])
    printed = {skeleton(line) for line in capsys.readouterr().out.splitlines()}
    assert {skeleton(line) for line in table.splitlines() if line.strip() != "..."} <= printed


def test_transformer_prints_lines_of_its_chapters_kind(capsys, tmp_path, monkeypatch):
    table = next(b for b in blocks(chapter(4), "") if "epoch  training" in b)
    transformer = importlib.import_module("transformer")
    monkeypatch.setattr(transformer, "BATCHES", 2)
    monkeypatch.setattr("inputs.dates.TEST_DAYS", 52)
    monkeypatch.setattr("inputs.dates.VALIDATION_DAYS", 10)
    transformer.main(["--device", "cpu", "--out", str(tmp_path), "--epochs", "1"])
    printed = {skeleton(line) for line in capsys.readouterr().out.splitlines()}
    wanted = table.partition("Test: ")[0].splitlines()
    assert len(wanted) >= 5
    assert {skeleton(line) for line in wanted} <= printed
    assert any(line.startswith("Test: ") for line in printed)


def test_gpt_prints_lines_of_its_chapters_kind(run_script, tmp_path):
    (table,) = (block for block in blocks(chapter(5), "") if "steps  training" in block)
    for n in range(40):
        (tmp_path / f"{n}.py").write_text(f"def add(a, b):\n    return a + b + {n}\n" * 4)
    done = run_script("gpt.py", "--device", "cpu", "--data", tmp_path, *OPTIONS)
    printed = {skeleton(line) for line in done.stdout.splitlines()}
    wanted = {skeleton(line) for line in table.splitlines()}
    assert len(wanted) >= 5
    assert wanted <= printed


def test_a_clone_has_line_feeds_wherever_it_is_made():
    attributes = (ROOT / ".gitattributes").read_text(encoding="utf-8")
    assert attributes.startswith("* text=auto eol=lf\n")
    assert not any(b"\r" in path.read_bytes() for path in (ROOT / "src").rglob("*.py"))


# Long runs

MANUAL = PAGES[ROOT / "docs/long-runs.md"]
TORCHRUN = MANUAL.partition("| option of torchrun |")[2].partition("\n\n")[0]


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if "torchrun " in c}))
def test_torchrun_takes_the_options_of_a_page(command):
    args = get_args_parser().parse_args(shlex.split(command.partition("torchrun ")[2]))
    assert args.training_script == "src/translation.py"


@pytest.mark.parametrize("options", re.findall(r"^\| `(.*?)` \|", TORCHRUN, re.MULTILINE))
def test_torchrun_takes_an_option_of_the_manual(options):
    get_args_parser().parse_args([*shlex.split(options), "src/translation.py"])


def test_every_option_that_the_manual_names_exists(capsys):
    for script in ("gpt", "translation"):
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
    print(end="", flush=True)
    known = {*re.findall(r"--[a-z-]+", capsys.readouterr().out), "--dependency"}
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    prose = re.sub(r"^```.*?^```$", "", MANUAL, flags=re.DOTALL | re.MULTILINE)
    assert {*re.findall(r"--[a-z]+(?:-[a-z]+)*", prose)} <= known


def printed_texts(script):
    """Return the texts in a script, without its docstrings."""
    nodes = [*ast.walk(ast.parse(script))]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings]
    return [constant.value for constant in constants if isinstance(constant.value, str)]


ERRORS = [row for row in re.findall(r"^\| `(.*?)`", MANUAL.partition("## Errors")[2], re.MULTILINE)]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_the_manual_stands_in_the_code(error):
    said = [text for script in SCRIPTS.values() for text in printed_texts(script)]
    parts = [part.strip(": ") for part in error.split("…")]
    assert any(map(len, parts))
    assert all(any(part in text for text in said) for part in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="the numbers are those of Linux")
def test_the_signals_of_the_manual_stop_a_run_with_these_statuses():
    rows = re.findall(r"^\| (SIG\w+) \| .*? \| (\d+)", MANUAL, re.MULTILINE)
    said = {signal.Signals[name]: int(status) for name, status in rows}
    assert all(status == 128 + number for number, status in said.items())
    before = {number: signal.getsignal(number) for number in said}
    with catching_signals():
        caught = {number for number in said if signal.getsignal(number) != before[number]}
    assert caught == {*said} - {signal.SIGKILL}
