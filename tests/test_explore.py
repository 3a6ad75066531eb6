import html
import importlib
import re
import runpy
import shutil
import socket
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import attention
import gpt
import transformer
from decoding.sampling import Sampling
from explorer import pictures, switches, trained
from inputs.dates import sample_dates, split_days
from make_models import MODELS

pytest.importorskip("marimo")
psutil = pytest.importorskip("psutil")  # which marimo brings
explore = importlib.import_module("explore")
screens = importlib.import_module("screens")

ROOT = Path(__file__).resolve().parent.parent
WORDS = attention.SENTENCE.split()
PATIENCE = 120  # seconds, for a busy machine
DATE = "12 de octubre de 1968"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Networks that are not trained, where the scripts save theirs."""
    runs = tmp_path_factory.mktemp("runs")
    script = importlib.import_module("fashion-mnist")
    vocabulary = transformer.make_vocabulary(sample_dates(split_days()[0][:2000], Random(0)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformer.Transformer(4 + len(vocabulary), transformer.Sizes())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # so that answers differ from date to date
        for name, network, about in (
            ("attention", attention.PairFinder(2), None),
            ("fashion-mnist", script.Classifier(), None),
            ("transformer", model, {"characters": "".join(vocabulary)}),
        ):
            trained.save(runs / name / "model.safetensors", network, about)
    shutil.copytree(MODELS / "llama-tied", runs / "gpt")
    (runs / "transformer/metrics.json").write_text('{"epochs": [[1.5, 0.7, 60.0]]}')
    return runs


def show(page, runs, published=Path("missing"), **controls):
    """Run the notebook as a script, open at a page; return what it shows."""
    defined = {"page": SimpleNamespace(value=page), "runs": runs, "published": published}
    outputs, _ = explore.app.run(defs=defined | controls)
    shown = "".join(output.text for output in outputs if output is not None)
    return html.unescape(html.unescape(shown))  # attributes are escaped once more


def test_the_notebook_runs_as_a_script(capsys):
    runpy.run_path(str(ROOT / "src/explore.py"), run_name="__main__")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("page", "seen"),
    [
        ("Formula", ["Scores QKᵀ", "Each row adds up to 1", "“cat” followed by hand"]),
        ("Heads", ["The sine pattern", "The largest difference is 0.00", "Head 2"]),
        ("Transformer", ["Its probabilities", "Encoder, from", "200 unseen dates predicted"]),
        ("Language model", ["Bits per byte", "shaded by bits", "its rivals", "The next token"]),
        ("Search", ["If it ended here", "transformer: loss", "learning rate"]),
        ("Photo", ["Drop a photo of a garment here"]),
    ],
)
def test_every_page_shows_what_it_is_for(runs, page, seen):
    shown = show(page, runs)
    assert [text for text in seen if text not in shown] == []
    assert "There is no network" not in shown


@pytest.mark.parametrize(
    ("page", "folder"),
    [("Heads", "attention"), ("Transformer", "transformer"), ("Search", "transformer")],
)
def test_a_network_that_is_missing_or_broken_is_named(tmp_path, page, folder):
    path = tmp_path / folder / "model.safetensors"
    shown = show(page, tmp_path)
    assert f"There is no network in {str(path)!r} yet." in shown and "Train " in shown
    trained.save(path, attention.PairFinder(2, d_model=32))
    shown = show(page, tmp_path)
    assert (
        f"not a model saved by this script; train one first: {path}: " in shown
        and "Train " in shown
    )


def control(value):
    return SimpleNamespace(value=value)


def test_a_sentence_that_is_none_is_answered_by_a_sentence(runs):
    others = {"d_k": control(4), "mask": control("none")}
    others |= {"scaled": control(True), "by_row": control(True)}
    for text, problem in (("", "these are 0"), ("a " * 11, "these are 11")):
        shown = show("Formula", runs, sentence=control(text), **others)
        assert f"Write 1 to 10 words; {problem}." in shown and "Scores" not in shown
        assert "Write a sentence" in show("Heads", runs, sentence=control(text), **others)
    shown = show("Formula", runs, sentence=control("<b>犬</b> $x$"), **others)
    assert "Weights, and their sum" in shown


def test_a_date_that_is_none_is_answered_by_a_sentence(runs):
    others = {"off_head": control(None), "learn_dates": control(False)}
    others |= dict.fromkeys(("positions", "causal", "memory", "root"), control(True))
    for text, problem in (
        ("", "these are 0"),
        ("1" * 61, "these are 61"),
        ("ᚠᚢ", "never seen ᚠ ᚢ before"),
        ("5/3/2026", "read in two ways"),
    ):
        for page in ("Transformer", "Search"):
            shown = show(page, runs, date=control(text), **others)
            assert problem in shown


def test_a_photo_that_is_none_is_answered_by_a_sentence(runs, tmp_path):
    photo = SimpleNamespace(value=[1], contents=lambda: b"no photo")
    shown = show("Photo", runs, photo=photo)
    assert "This is not a photo of a garment" in shown
    shown = show("Photo", tmp_path, photo=photo)
    assert "train one first" in shown


def test_a_published_language_model_stands_in_for_ones_own(runs, tmp_path):
    shown = show("Language model", runs)
    assert "your own" in shown and "SmolLM2" not in shown
    shown = show("Language model", tmp_path)
    path = tmp_path / "gpt"
    assert f"There is no network in {str(path)!r} yet." in shown and "Train " in shown
    assert "Bits per byte" not in shown and "A text" not in shown
    shown = show("Language model", tmp_path, MODELS / "llama")
    assert "SmolLM2" in shown and "Train " in shown and "Bits per byte" in shown
    path.write_text("no folder")
    shown = show("Language model", tmp_path, path)
    assert shown.count(f"{path}: ") == 2 and "Bits per byte" not in shown


def test_a_text_that_is_none_or_too_long_is_answered_by_a_sentence(runs):
    names = ("base", "chance", "hidden", "learn_gpt", "rotated", "temperature", "top_p")
    values = (None, 0, True, False, True, 1.0, 1.0)
    others = {name: control(value) for name, value in zip(names, values, strict=True)}
    for text, seen, hidden in (
        ("", "Write a text", "Bits per byte"),
        ("ab" * 500, "These are the first 48 of 1,000 tokens", "Write a text"),
        ("<b>犬</b> $x$\n\u0301", "↵", "Write a text"),
    ):
        shown = show("Language model", runs, text=control(text), **others)
        assert seen in shown and hidden not in shown


def expect(page, name, matrix, seconds=PATIENCE):
    """Wait until a table has these numbers."""
    expected, end = [f"{x:.4g}" for x in matrix.flatten().tolist()], time.monotonic() + seconds
    while True:
        found = page.get_by_role("table", name=name).evaluate_all(
            "tables => tables.flatMap(t => [...t.querySelectorAll('td[title]')].map(c => c.title))"
        )
        if found == expected or time.monotonic() > end:
            assert found == expected
            return
        time.sleep(0.05)


def expect_text(locator, text, seconds=PATIENCE):
    """Wait until an element has this text."""
    end = time.monotonic() + seconds
    while locator.text_content() != text and time.monotonic() < end:
        time.sleep(0.05)
    assert locator.text_content() == text


class Visit:
    """A visit of the page, in a browser that is moved by the keyboard alone."""

    def __init__(self, page, address):
        self.page, self.asked, self.problems = page, set(), []
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("websocket", lambda opened: self.asked.add(opened.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.set_default_timeout(1000 * PATIENCE)
        screens.open_page(page, address, PATIENCE)

    def turn_to(self, name):
        self.press(self.page.get_by_label("Page", exact=True), name[0])

    def press(self, locator, *keys):
        locator.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def switch(self, name):
        self.press(self.page.get_by_role("switch", name=name, exact=True), "Space")

    def slider(self, name):
        return self.page.locator("marimo-slider", has_text=name).get_by_role("slider")

    def choose(self, name, option):
        self.page.get_by_label(name).select_option(option)


@pytest.fixture(scope="module")
def visit(runs):
    if not screens.CHROMIUM:
        pytest.skip("no Chromium")
    with screens.serving(runs) as (process, address), screens.browsing() as browser:
        visit = Visit(browser.new_page(viewport={"width": 1280, "height": 900}), address)
        visit.process, visit.address, visit.browser = process, address, browser
        yield visit


def formula(d_k=4, change=0.0, **switched):
    """The steps of the formula for the sentence, with a change of the first number of Q."""
    x, head = switches.draw_sentence(WORDS, d_k)
    Q, K, V = head.W_q(x).double(), head.W_k(x).double(), head.W_v(x)[:, :4].double()
    Q[0, 0] += change
    return switches.attend(Q, K, V, **switched)


def with_sums(weights):
    return torch.cat((weights, weights.sum(dim=1, keepdim=True)), dim=1)


@pytest.mark.slow
def test_in_the_browser_the_formula_follows_each_switch(visit):
    page, weights = visit.page, "Weights, and their sum"
    visit.turn_to("Formula")
    expect(page, weights, with_sums(formula().weights))
    expect(page, "Output", formula().output)
    visit.press(page.get_by_test_id("matrix-cell-0-0").first, "ArrowRight")
    expect(page, "Scores", formula(change=0.1).scores)
    visit.press(page.get_by_test_id("matrix-cell-0-0").first, "ArrowLeft")
    expect(page, "Scores", formula().scores)
    visit.switch("divide by √d_k")
    expect(page, "What the softmax gets", formula(scaled=False).scaled)
    visit.switch("divide by √d_k")
    visit.switch("softmax of each row (off: of each column)")
    expect(page, weights, with_sums(formula(by_row=False).weights))
    page.get_by_text("don't add up to 1").wait_for()
    visit.switch("softmax of each row (off: of each column)")
    for mask, text in (
        ("causal", "Each row adds up to 1"),
        ("padding: the last word", "Each row adds up to 1"),
        (switches.WRONG_MASKS[1], "The future leaks"),
        (switches.WRONG_MASKS[0], "NaN in row 5"),
    ):
        visit.choose("Mask", mask)
        expect(page, weights, with_sums(formula(mask=mask).weights))
        page.get_by_text(text).wait_for()
    visit.choose("Mask", "none")
    visit.press(visit.slider("d_k"), "End")
    expect(page, weights, with_sums(formula(d_k=1024).weights))
    visit.choose("Follow", "5. dog")
    page.get_by_role("table", name="“dog” followed by hand").wait_for()
    sentence = page.get_by_label("Sentence")
    sentence.fill("")
    visit.press(sentence, "Enter")
    page.get_by_text("Write 1 to 10 words").wait_for()
    sentence.fill(attention.SENTENCE)
    visit.press(sentence, "Enter")
    expect(page, weights, with_sums(formula(d_k=1024).weights))


@pytest.mark.slow
def test_in_the_browser_positions_and_heads_follow_each_switch(visit, runs):
    page = visit.page
    visit.turn_to("Heads")
    P = attention.positional_encoding(30, 32)
    expect(page, "Position 9 times", P[9] @ P[5:14].T)
    visit.press(visit.slider("follow position"), "ArrowRight")
    expect(page, "Position 10 times", P[10] @ P[6:15].T)
    visit.press(visit.slider("d_model"), "ArrowRight")
    P = attention.positional_encoding(30, 64)
    expect(page, "Position 10 times", P[10] @ P[6:15].T)
    visit.press(visit.slider("positions"), "Home")
    expect(page, "Position 3 times", P[3] @ P[:4].T)
    visit.switch("add positions to the words")
    expect(page, "The same words, from", switches.shuffle(WORDS, 1, True)[2])
    visit.press(visit.slider("order"), "ArrowRight")
    expect(page, "The same words, from", switches.shuffle(WORDS, 2, True)[2])
    model = trained.open_pairs(runs / "attention/model.safetensors")
    for option, head in (("2", 1), ("none", None)):
        visit.choose("Head switched off", option)
        weights, _, shares = switches.score_pairs(model, head)
        expect(page, "Predicted right, of 1,000", shares)
        expect(page, "Head 2", weights[1])


@pytest.mark.slow
def test_in_the_browser_the_transformer_follows_each_switch(visit, runs):
    page = visit.page
    network, vocabulary = transformer.open_model(runs / "transformer/model.safetensors")

    def follow(date, off=(), head=None):
        model = switches.switch_off(network, off, head)
        source, _ = trained.encode_date(date, vocabulary)
        tokens, probabilities = switches.write_slowly(model, source)
        answer = switches.spell(tokens[0].tolist(), vocabulary)
        expect(page, "Its probabilities", probabilities[0, : len(answer) + 1].topk(3).values.T)
        return model, source, answer

    visit.turn_to("Transformer")
    follow(DATE)
    for part in switches.PARTS:
        visit.switch(part)
        follow(DATE, [part])
        visit.switch(part)
    visit.choose("Head switched off", "decoder layer 2, cross attention, head 2")
    follow(DATE, (), ("decoder.1.cross_attention", 1))
    visit.choose("Head switched off", "none")
    date = page.get_by_label("A date")
    date.fill("1. juni 1999")
    visit.press(date, "Enter")
    model, source, answer = follow("1. juni 1999")
    visit.press(visit.slider("Follow character"), "Home", "ArrowRight")
    target = torch.tensor([[1, *map(vocabulary.get, answer)]])
    weights = transformer.look_inside(model, source, target)
    chosen = [weights[f"decoder.{n}.cross_attention"][0, :, 1] for n in range(2)]
    expect(page, "Decoder, to the text", torch.cat(chosen))
    unseen = sample_dates(split_days()[2][:200], Random(2))
    share = switches.score_dates(network, vocabulary, unseen)
    expect(page, "200 unseen dates", torch.tensor([share, share]))


@pytest.mark.slow
def test_in_the_browser_the_search_follows_each_switch(visit, runs):
    page = visit.page
    network, vocabulary = transformer.open_model(runs / "transformer/model.safetensors")
    visit.turn_to("Search")
    page.get_by_role("table", name="If it ended here").wait_for()  # the date before is gone
    date = page.get_by_label("A date")
    date.fill(DATE)
    visit.press(date, "Enter")

    def follow(beam, alpha, upto):
        source, _ = trained.encode_date(DATE, vocabulary)
        _, steps = switches.watch_beam(network, source, beam, alpha)
        ended = sorted((b for step in steps[1:] for b in step), key=lambda branch: -branch.score)[
            :5
        ]
        page.get_by_role("row").filter(has_text=pictures.decimal(ended[0].score)).first.wait_for()
        nodes = sum(map(len, steps[:upto]))
        page.wait_for_function(f"document.querySelectorAll('svg tspan').length == {nodes}")

    follow(3, 1.2, 12)
    visit.press(visit.slider("beam"), "ArrowLeft")
    follow(2, 1.2, 12)
    visit.press(visit.slider("length penalty"), "Home")
    follow(2, 0, 12)
    visit.press(visit.slider("show steps up to"), "Home", "ArrowRight")
    follow(2, 0, 2)
    page.get_by_text("transformer: loss").wait_for()


@pytest.mark.slow
def test_in_the_browser_the_language_model_follows_each_switch(visit, runs):
    page = visit.page
    model, texts = gpt.open_model(runs / "gpt")
    encoded, cut = trained.encode_text(explore.TEXT, texts, 48)
    ids = encoded.ids

    def follow(changed):
        length = len(texts.tokenizer.decode(ids).encode())
        predicted = [switches.predict_each(m, ids) for m in (model, changed)]
        sums = [switches.count_bits(bits, ids).sum() for bits in predicted]
        expect(page, "Bits per byte of the text", torch.stack(sums) / length)
        return predicted[1]

    def follow_token(bits, place, token):
        rivals = switches.find_rivals(bits[place - 1], token)
        expected = (-bits[place - 1][rivals]).exp2().unsqueeze(1).expand(-1, 2)
        expect(page, "and its rivals", expected)

    visit.turn_to("Language model")
    bits = follow(model)
    page.get_by_text(cut).wait_for()
    follow_token(bits, 3, ids[3])
    visit.press(visit.slider("Follow token"), "ArrowRight")
    follow_token(bits, 4, ids[4])
    for part in switches.GPT_PARTS:
        visit.switch(part)
        changed = switches.change_gpt(model, [part])
        follow_token(follow(changed), 4, ids[4])
        if part == "causal mask":
            page.get_by_text("Without the mask, the network also sees").wait_for()
        visit.switch(part)
    visit.press(page.get_by_label("Base of the frequencies"), "1", "0", "0", "Enter")
    follow(switches.change_gpt(model, theta=100.0))
    visit.press(page.get_by_label("Base of the frequencies"), "Home")
    visit.press(page.get_by_label("Head switched off"), "3")
    follow(switches.change_gpt(model, head=(0, 2)))
    visit.press(page.get_by_label("Layer"), "2")
    follow(switches.change_gpt(model, head=(1, 2)))
    visit.press(page.get_by_label("Head switched off"), "n")
    text = page.get_by_label("A text")
    visit.press(text, "Control+a")
    page.keyboard.type("add it")
    ids = [texts.mark, *texts.tokenizer.encode("add it").ids]
    bits = follow(model)
    before = (-bits[-1].double()).exp2()

    def follow_sampling(sampling, seed=0):
        after = switches.sampled_from(before.log(), sampling)
        shown = before.topk(10).indices
        matrix = torch.stack((before, after), dim=1)
        others = matrix.sum(dim=0) - matrix[shown].sum(dim=0)
        expect(page, "The next token", torch.cat((matrix[shown], others.unsqueeze(0))))
        written = switches.continue_text(model, texts, ids, sampling, seed, explore.WRITTEN)
        figure = page.locator("figure", has_text="With the sliders").locator("pre")
        expect_text(figure, trained.spell_text(written, texts, ids))

    follow_sampling(Sampling(temperature=0.8))
    visit.press(visit.slider("temperature"), "Home")
    follow_sampling(Sampling(temperature=0))
    visit.press(visit.slider("temperature"), "End")
    follow_sampling(Sampling(temperature=2))
    visit.press(visit.slider("top-k"), "Home", "ArrowRight")
    follow_sampling(Sampling(2, top_k=2))
    visit.press(visit.slider("top-k"), "End")
    visit.press(visit.slider("top-p"), "ArrowLeft", "ArrowLeft")
    follow_sampling(Sampling(2, top_p=0.9))
    visit.press(visit.slider("seed"), "ArrowRight")
    follow_sampling(Sampling(2, top_p=0.9), seed=1)


@pytest.mark.slow
def test_in_the_browser_a_photo_is_classified(visit, runs, tmp_path):
    page = visit.page
    visit.turn_to("Photo")
    photo = Image.new("RGB", (100, 120), "white")
    photo.paste((90, 20, 20), (30, 20, 70, 100))
    photo.save(tmp_path / "photo.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "photo.png")
    path = runs / "fashion-mnist/model.safetensors"
    _, probabilities = trained.classify((tmp_path / "photo.png").read_bytes(), path)
    expect(page, "Probabilities", torch.tensor([*probabilities.values()]))


@pytest.mark.slow
def test_in_the_browser_all_text_is_large_enough_and_fits(visit):
    script = """() => {
      const small = [];
      const walk = root => root.querySelectorAll('*').forEach(e => {
        if (e.shadowRoot) walk(e.shadowRoot);
        const text = [...e.childNodes].filter(c => c.nodeType == 3).map(c => c.data).join('');
        const box = e.getBoundingClientRect();
        if (text.replace(/[\\s\\u200b]/g, '') && box.width && !e.closest('style, script')
            && parseFloat(getComputedStyle(e).fontSize) < 12) small.push(text);
      });
      walk(document.body);
      return [small, document.documentElement.scrollWidth];
    }"""
    for width in (1280, 400):
        visit.page.set_viewport_size({"width": width, "height": 900})
        for name in explore.PAGES:
            visit.turn_to(name)
            visit.page.wait_for_timeout(500)
            small, scrolled = visit.page.evaluate(script)
            assert small == [] and scrolled <= width, name


@pytest.mark.slow
def test_in_the_browser_nothing_is_asked_of_another_host(visit):
    port = visit.address.rsplit(":")[-1]
    assert visit.asked and visit.problems == []
    hosts = {re.match(r"(\w+):(?://([^/]*))?", url).groups() for url in visit.asked}
    allowed = {(scheme, f"127.0.0.1:{port}") for scheme in ("http", "ws")}
    assert hosts <= allowed | {("data", None), ("blob", f"http:{port}"), ("blob", None)}
    for process in (server := psutil.Process(visit.process.pid), *server.children(recursive=True)):
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN and connection.family == socket.AF_INET:
                assert connection.laddr.ip == "127.0.0.1"
            assert not connection.raddr or connection.raddr.ip == "127.0.0.1"
