"""The README is true: its commands, its outputs, its code, its links and its pictures."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "src").glob("*.py")}
CHAPTERS = re.split(r"^## ", README, flags=re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def blocks(text, language):
    """Return the fenced blocks of a language; outputs have none."""
    fences = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for found, content in fences if found == language]


COMMANDS = [line for block in blocks(README, "sh") for line in block.splitlines()]
RUNS = sorted(
    {c[c.index("src/") :] for c in COMMANDS if c.startswith("poetry run") and "src/" in c}
)


def chapter_of(script):
    return next(chapter for chapter in CHAPTERS if f"\n[src/{script}]" in chapter)


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


@pytest.mark.parametrize("code", sorted(set(blocks(README, "python"))))
def test_quoted_code_stands_in_a_script(code):
    assert any(code in script for script in SCRIPTS.values())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_a_link_leads_somewhere(target):
    path, _, heading = target.partition("#")
    assert not path or (ROOT / path).is_file()
    if heading and not path:
        titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.parametrize(
    ("name", "path", "line"), sorted(set(re.findall(r"\[([\w.]+)\]\((src/.*?)#L(\d+)\)", README)))
)
def test_a_link_to_a_line_leads_to_the_definition_of_its_name(name, path, line):
    found = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
    assert re.match(rf" *(def|class) {name.rpartition('.')[2]}\b", found)


@pytest.mark.parametrize("command", RUNS)
def test_a_command_can_be_given(command, capsys):
    script, *arguments = shlex.split(command.split(" < ")[0])
    assert os.access(ROOT / script, os.X_OK)
    with pytest.raises(SystemExit):
        importlib.import_module(Path(script).stem).main(["--help"])
    print(end="", flush=True)
    flags = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert {argument for argument in arguments if argument.startswith("--")} <= {*flags}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|\n)make ([a-z-]+)", README))))
def test_a_target_that_is_named_exists(target):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_make_bench_can_run_every_benchmark():
    assert all(os.access(path, os.X_OK) for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("picture", sorted(set(re.findall(r"!\[[^]]+\]\((.*?)\)", README))))
def test_a_picture_is_drawn_by_make_docs(picture):
    recipe = re.search(r"^docs:.*?\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    assert re.search(rf"runs/\S+ {re.escape(picture)}$", recipe, re.MULTILINE)


def test_hello_prints_what_the_readme_says(capsys):
    (output,) = blocks(chapter_of("pytorch-hello.py"), "")
    importlib.import_module("pytorch-hello").main(["--device", "cpu"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("PyTorch ")
    assert_printed(output.partition("\n")[2], printed)


def test_attention_prints_what_the_readme_says(capsys, tmp_path):
    outputs = blocks(chapter_of("attention.py"), "")
    attention = importlib.import_module("attention")
    attention.main(["--device", "cpu", "--steps", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    assert len(outputs) >= 4
    for output in outputs:
        if output.startswith("Why positions"):  # trained for longer, so only in form
            wanted = {skeleton(line) for line in output.partition("  head 1")[0].splitlines()}
            assert wanted - {""} <= {skeleton(line) for line in printed}
        else:
            for part in output.strip().split("\n\n"):
                assert_printed(part, printed)


def test_fashion_mnist_prints_lines_of_the_readmes_kind(capsys, tmp_path):
    table = next(b for b in blocks(chapter_of("fashion-mnist.py"), "") if b.startswith("epoch"))
    fashion = importlib.import_module("fashion-mnist")
    fashion.main(["--sample", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path)])
    printed = {skeleton(line) for line in capsys.readouterr().out.splitlines()}
    assert {skeleton(line) for line in table.splitlines() if line.strip() != "..."} <= printed


def test_transformer_prints_lines_of_the_readmes_kind(capsys, tmp_path, monkeypatch):
    table = next(b for b in blocks(chapter_of("transformer.py"), "") if "epoch  training" in b)
    transformer = importlib.import_module("transformer")
    monkeypatch.setattr(transformer, "BATCHES", 2)
    monkeypatch.setattr("dates.TEST_DAYS", 52)
    monkeypatch.setattr("dates.VALIDATION_DAYS", 10)
    transformer.main(["--device", "cpu", "--out", str(tmp_path), "--epochs", "1"])
    printed = {skeleton(line) for line in capsys.readouterr().out.splitlines()}
    wanted = table.partition("Test: ")[0].splitlines()
    assert len(wanted) >= 5
    assert {skeleton(line) for line in wanted} <= printed
    assert any(line.startswith("Test: ") for line in printed)
