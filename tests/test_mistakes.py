"""Each mistake of "What goes wrong" is made, and what is seen is what its row says."""

import inspect
import math
import re
import runpy
import tomllib
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attention
import changes
import gpt as G
import test_smollm2 as smollm2
import transformer
from conftest import ROOT, SMALL, corpus_of, draw, make, save_text
from decoding import search
from inputs import pairs as corpus
from inputs.phrases import sample_pairs
from inputs.text import PAD
from test_gguf import write_model
from test_search import score_of
from test_translation import random_pairs
from transformer import Sizes, Transformer

BUGS = tomllib.loads((ROOT / "src/exercises/exercises.toml").read_text(encoding="utf-8"))["bug"]
NAMES = ("1-hello", "2-fashion-mnist", "3-attention", "4-transformer", "5-gpt", "6-translation")
PAGES = [f"{name}.md" for name in NAMES]


def rows(page):
    """Return what is seen for each mistake of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition("## What goes wrong\n")[2].partition("\n##")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return dict(re.fullmatch(r"\| (.*?) \| (.*) \|", line).groups() for line in lines)


ROWS = {page: rows(page) for page in PAGES}
MADE = {page: set() for page in PAGES}


def row(page, start):
    """Note that the mistake whose row begins so is made; return what the row says is seen."""
    (name,) = [name for name in ROWS[page] if name.startswith(start)]
    MADE[page].add(name)
    return ROWS[page][name]


SAID = []


def makes(page, start, *words):
    """Note that a test makes a mistake, and the words of its row that the test shows to be true.

    The test gets the row if it asks for what is seen.
    """
    seen = row(page, start)
    SAID.extend((seen, each) for each in words)

    def mark(test):
        asks = "seen" in inspect.signature(test).parameters
        return pytest.mark.parametrize("seen", [seen], ids=["seen"])(test) if asks else test

    return mark


def source(script):
    return (ROOT / "src" / script).read_text(encoding="utf-8")


def percentages(seen):
    return [float(number) for number in re.findall(r"([\d.]+) %", seen)]


def bug(script, part):
    """Return the mistake of practice.py that changes this part of a script."""
    (found,) = [each for each in BUGS if each["script"] == script and part in each["old"]]
    return found["old"], found["new"]


@pytest.fixture
def changed(tmp_path):
    """Run a script of src/ with an edit; return its names."""

    def run(script, old, new):
        text = source(script)
        assert text.count(old) == 1
        path = tmp_path / Path(script).name
        path.write_text(text.replace(old, new), encoding="utf-8")
        return runpy.run_path(str(path), run_name="changed")

    return run


X = torch.linspace(-1, 1, 100)


def line(fit_line, steps=200):
    """Fit the line of pytorch-hello.py."""
    torch.manual_seed(0)
    y = 3 * X - 2 + 0.3 * torch.randn(100)
    return fit_line(X, y, steps, 0.2)


@makes("1-hello.md", "no `optimizer")
def test_without_zero_grad_the_line_swings_about(changed, seen):
    names = changed("pytorch-hello.py", *bug("pytorch-hello.py", "zero_grad"))
    slope, intercept = re.findall(r"at (\S+) and (−\S+)", seen)[0]
    expected = float(slope), -float(intercept[1:])
    assert line(names["fit_line"]) == pytest.approx(expected, abs=0.0002)
    slopes = [line(names["fit_line"], steps)[0] for steps in range(180, 200)]
    assert min(slopes) < 2.9996 < max(slopes)


@makes("1-hello.md", "no `.squeeze")
def test_without_squeeze_the_line_is_flat_and_pytorch_warns(changed, seen):
    names = changed("pytorch-hello.py", *bug("pytorch-hello.py", "squeeze(1)"))
    with pytest.warns(UserWarning, match="broadcasting"):
        slope, _ = line(names["fit_line"])
    assert f"slope {abs(slope):.4f}" in seen


@makes(
    "1-hello.md",
    "no `loss",
    "no error: nothing is learned",
)
def test_without_backward_nothing_is_learned(changed):
    names = changed("pytorch-hello.py", "        loss.backward()\n", "")
    assert line(names["fit_line"], steps=0) == line(names["fit_line"])


CUT = row("1-hello.md", "`prediction.det")


@pytest.mark.parametrize(
    ("seen", "old", "new"),
    [
        (CUT, "mse_loss(prediction, y)", "mse_loss(prediction.detach(), y)"),
        (CUT, "(prediction, y)", "(torch.tensor(prediction.tolist()), y)"),
        (row("1-hello.md", "`.item"), "mse_loss(prediction, y)", "mse_loss(prediction, y).item()"),
    ],
    ids=["detach", "list", "item"],
)
def test_a_cut_link_to_the_parameters_is_an_error(changed, seen, old, new):
    names = changed("pytorch-hello.py", old, new)
    kind, message = re.findall(r"`(\w+Error): (.*?)`: ", seen)[0]
    with pytest.raises(Exception, match="^" + message) as error:
        line(names["fit_line"])
    assert type(error.value).__name__ == kind


FASHION = next(page for page in changes.PAGES if page["page"] == "2-fashion-mnist.md")


def accuracy(old="", new=""):
    """Return the validation accuracy of the last epoch, in percent."""
    return changes.measure(FASHION, {"old": old, "new": new})[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seen", "old", "new"),
    [
        (row(FASHION["page"], "no `opt"), "        optimizer.zero_grad()\n", ""),
        (
            row(FASHION["page"], "images in"),
            "order = torch.randperm(len(images))",
            "order = labels.cpu().argsort()",
        ),
        (row(FASHION["page"], "a softmax"), *bug("fashion-mnist.py", "cross_entropy")),
        (
            row(FASHION["page"], "pre"),
            "(model(x) + model(x.flip(-1)))",
            "(model(x / 255) + model(x.flip(-1) / 255))",
        ),
    ],
)
def test_a_mistake_of_the_training_costs_accuracy(seen, old, new):
    said = percentages(seen)[0]
    assert accuracy(old, new) == pytest.approx(said, abs=3.0)


@makes("2-fashion-mnist.md", "a softmax")
def test_a_softmax_before_the_cross_entropy_keeps_the_loss_high(seen):
    old, new = bug("fashion-mnist.py", "cross_entropy")
    assert (old.count("logits"), new.count("logits.softmax(dim=1)")) == (1, 1)
    best = F.one_hot(torch.tensor([3]), 10).float()  # what softmax makes of a sure prediction
    lowest = F.cross_entropy(best, torch.tensor([3]), label_smoothing=0.1).item()
    (said,) = re.findall(r"fall below ([\d.]+)", seen)
    assert lowest == pytest.approx(float(said), abs=0.005)


@makes("2-fashion-mnist.md", "no `eval")
@pytest.mark.slow
@pytest.mark.parametrize("place", range(3))
def test_without_eval_an_image_is_normalized_by_the_others(place, seen):
    size = (1000, 10, 2)[place]
    old = re.search(r"    model\.eval\(\)\n    return torch.cat.*", source("fashion-mnist.py"))[0]
    new = old.replace("    model.eval()\n", "").replace("2500", str(size))
    assert accuracy(old, new) == pytest.approx(percentages(seen)[place], abs=3.0)


@makes("2-fashion-mnist.md", "settings")
def test_settings_chosen_by_validation_images_reach_less_on_the_test_set(seen):
    """The two numbers are those of measurements.md and of the run in the chapter."""
    seen = percentages(seen)
    text = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
    validation = float(re.search(r"16 epochs: the script \| [\d.]+ ± [\d.]+ \| ([\d.]+)", text)[1])
    assert seen[0] == pytest.approx(validation, abs=0.05)
    assert seen[1] < seen[0]


def weights_under(mask):
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 4, 8)
    return attention.scaled_dot_product_attention(Q, K, V, mask)[1]


@makes(
    "3-attention.md",
    "a mask made",
    "no error: each query attends to exactly the words that should be hidden",
)
def test_a_mask_that_is_true_where_it_forbids_shows_what_should_be_hidden():
    theirs = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.bool)
    ours = attention.causal_mask(4)
    assert torch.equal(theirs, ~ours)
    weights = weights_under(theirs)
    assert ((weights > 0) == ~ours).all()


@makes(
    "3-attention.md",
    "a mask of",
    "no error: nothing is hidden",
    "a mask must be boolean",
)
def test_ones_and_zeros_that_are_added_hide_nothing():
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 4, 8)
    mask = attention.causal_mask(4).float()
    assert ((Q @ K.T / math.sqrt(8) + mask).softmax(dim=-1) > 0).all()
    with pytest.raises(ValueError, match="bool"):
        attention.scaled_dot_product_attention(Q, K, V, mask)


@makes(
    "3-attention.md",
    "−∞",
    "NaN in its output",
    "even if the loss ignores that output, in the whole gradient of V",
    "The script returns zeros",
)
@pytest.mark.parametrize("fails", [True, False])
def test_minus_infinity_everywhere_makes_nan_even_in_the_gradients(changed, fails):
    formula = attention.scaled_dot_product_attention
    if fails:
        line = "scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)\n"
        after = "        weights = scores.softmax(dim=-1)"
        old = line + after + ".masked_fill(~mask, 0.0)"
        new = "scores = scores.masked_fill(~mask, -math.inf)\n" + after
        formula = changed("attention.py", old, new)["scaled_dot_product_attention"]
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0] = False
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 3, 8).unbind()
    V.requires_grad_()
    output = formula(Q, K, V, mask)[0]
    assert output[0].isnan().all() if fails else not output[0].any()
    output[1:].sum().backward()  # leaves the first query out
    assert V.grad.isnan().all() == fails


@makes(
    "3-attention.md",
    "softmax",
    "no longer add up to 1",
    "with a causal mask the future leaks",
)
def test_softmax_over_the_queries_lets_the_future_leak(changed):
    names = changed("attention.py", *bug("attention.py", "weights = scores.softmax(dim=-1)\n"))
    torch.manual_seed(0)
    Q, K, V = torch.randn(3, 4, 8, dtype=torch.float64)
    weights = names["scaled_dot_product_attention"](Q, K, V)[1]
    assert not torch.allclose(weights.sum(dim=-1), torch.ones(4, dtype=torch.float64))
    hidden = (Q @ K.T).masked_fill(~attention.causal_mask(4), -math.inf)
    first = hidden.softmax(dim=-2)[0]
    Q[3] += 1  # a later word
    changed_first = (Q @ K.T).masked_fill(~attention.causal_mask(4), -math.inf).softmax(dim=-2)[0]
    assert not torch.allclose(first, changed_first)


@makes(
    "3-attention.md",
    "`is_causal",
    "the first query sees only the first key",
    "`causal_mask(4)[-2:]` is right",
)
def test_is_causal_with_fewer_queries_than_keys_starts_at_the_first_key():
    torch.manual_seed(0)
    Q, K, V = torch.randn(1, 2, 8), torch.randn(1, 4, 8), torch.eye(4).unsqueeze(0)
    weights = F.scaled_dot_product_attention(Q, K, V, is_causal=True)[0]
    assert [*map(int, (weights > 0).sum(dim=1))] == [1, 2]
    mask = attention.causal_mask(4)[-2:]
    weights = F.scaled_dot_product_attention(Q, K, V, mask)[0]
    assert [*map(int, (weights > 0).sum(dim=1))] == [3, 4]


@makes(
    "4-transformer.md",
    "the target",
    "the lowest value that smoothed labels allow",
    "can't write a date by itself",
)
def test_a_target_that_is_not_shifted_is_only_copied(changed):
    old, new = bug("transformer.py", "labels = target[:, 1:]")
    assert new == "labels = target[:, :-1]"
    names = changed("transformer.py", old, new)
    vocabulary = {character: i for i, character in enumerate("0123456789-abcdefghij", start=3)}
    random = Random(0)
    text = ["".join(random.choices("0123456789", k=6)) for _ in range(2000)]
    pairs = [(each, each) for each in text]
    # The labels as in train(), which learns dates, for a copy of what the decoder is given.
    torch.manual_seed(0)
    model = names["Transformer"](24, names["Sizes"](32, 2, 1, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    for start in range(0, 2000, 20):
        source, target = names["make_batch"](pairs[start : start + 20], vocabulary)
        labels = target[:, :-1]
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = torch.full((24,), 0.1 / 24)
    share[0] += 0.9
    assert loss.item() == pytest.approx(-(share * share.log()).sum().item(), abs=0.1)
    assert (logits.argmax(dim=-1) == target[:, :-1]).float().mean() > 0.95
    source, _ = names["make_batch"](pairs[:3], vocabulary)
    for ids in names["generate"](model, source):  # repeats BOS until the limit
        assert set(ids) == {transformer.BOS}


@makes(
    "4-transformer.md",
    "padding",
    "the prediction for a date depends on the others in its batch",
)
def test_padding_masked_on_the_rows_lets_a_text_change_with_its_neighbors(changed, monkeypatch):
    names = changed("attention.py", *bug("attention.py", "(tokens != pad)"))
    alone, beside = draw([4]), draw([4, 7])
    beside[0] = F.pad(alone[0], (0, 3), value=PAD)
    model = make(norm_first=False)
    torch.testing.assert_close(model.encode(alone)[0], model.encode(beside)[0, :4])
    monkeypatch.setattr(transformer, "padding_mask", names["padding_mask"])
    assert not torch.allclose(model.encode(alone)[0], model.encode(beside)[0, :4])


@makes(
    "4-transformer.md",
    "the layers in a plain list",
    "no error",
    "All layers stay as random as they were",
)
def test_layers_in_a_plain_list_are_not_found(changed, seen):
    text = source("transformer.py")
    stacks = re.search(r"        self\.encoder = .*\n        self\.decoder = .*\n", text)[0]
    plain = re.sub(r"nn\.ModuleList\((.*)\)", r"[\1]", stacks)
    names = changed("transformer.py", stacks, plain)
    wrong = names["Transformer"](250, names["Sizes"]())
    model = transformer.Transformer(250, transformer.Sizes())
    counts = [sum(p.numel() for p in each.parameters()) for each in (wrong, model)]
    assert counts == [int(n.replace(",", "")) for n in re.findall(r"\d+,\d+", seen)]
    assert wrong(draw([5, 3]), draw([6, 6])).isfinite().all()
    assert [*wrong.state_dict()] == ["embedding.weight"]


@makes(
    "4-transformer.md",
    "no `eval",
    "answers change every time",
)
def test_without_eval_dropout_stays_on(changed):
    body = source("transformer.py").partition("def generate(")[2].partition("\n\n\n")[0]
    wrong = changed("transformer.py", body, body.replace(".eval()", ""))["generate"]
    torch.manual_seed(0)
    model, dates = make(dropout=0.5).train(), draw([6, 5, 4])
    assert len({str(wrong(model, dates)) for _ in range(5)}) > 1
    model.train()
    assert len({str(transformer.generate(model, dates)) for _ in range(5)}) == 1


@makes(
    "4-transformer.md",
    "a cache",
    "every new token is treated as if it were at position 0",
)
def test_a_cache_that_forgets_where_it_is_puts_every_token_at_position_0(changed):
    wrong = changed("transformer.py", *bug("transformer.py", "start=t)"))["generate_cached"]
    model, source = make(), draw([6, 5, 4])
    embed, starts = model.embed, []
    model.embed = lambda tokens, start=0: starts.append(start) or embed(tokens, start)
    transformer.generate_cached(model, source)
    assert starts[1:] == [*range(len(starts) - 1)]  # the first call is the encoder's
    starts.clear()
    wrong(model, source)
    assert set(starts) == {0}


SILENT = {  # how the row of each mistake begins; its edit is made with SmolLM2 by test_smollm2.py
    smollm2.forget_the_mask: row("5-gpt.md", "no causal mask"),
    smollm2.change_epsilon: row("5-gpt.md", "the norms' epsilon"),
    smollm2.change_base: row("5-gpt.md", "the base"),
    smollm2.leave_interleaved: row("5-gpt.md", "pairs"),
    smollm2.forget_positions: row("5-gpt.md", "no positions"),
    smollm2.forget_the_scale: row("5-gpt.md", "no division"),
    smollm2.tile_heads: row("5-gpt.md", "heads"),
}


@pytest.fixture
def tiny(tmp_path):
    """Open a tiny model with the base of SmolLM2; return what it predicts."""
    path = tmp_path / "model.gguf"
    write_model(path, facts={"llama.rope.freq_base": 100_000.0})

    def predict(tokens):
        with torch.inference_mode():
            return G.open_model(path)[0](tokens)

    return predict


@pytest.mark.parametrize("mistake", SILENT)
def test_a_silent_mistake_changes_the_logits_and_raises_no_error(mistake, tiny, monkeypatch):
    tokens = torch.tensor([[5, 9, 200, 31, 9, 5, 77]])
    expected = tiny(tokens)
    mistake(monkeypatch)
    logits = tiny(tokens)
    assert logits.isfinite().all()
    assert not torch.equal(logits, expected)


def test_the_losses_of_silent_mistakes_are_those_of_smollm2():
    assert SILENT.keys() == smollm2.MISTAKES.keys()
    for mistake, seen in SILENT.items():
        nats, word, _ = (cell.strip(" *") for cell in seen.split("|"))
        assert float(nats) == pytest.approx(smollm2.MISTAKES[mistake], abs=0.01)
        assert (word == "Rome") == (mistake in (smollm2.change_base, smollm2.change_epsilon))


def test_without_a_causal_mask_a_token_sees_the_next_one(tiny, monkeypatch):
    tokens = torch.tensor([[5, 9, 200], [5, 9, 31]])
    first, second = tiny(tokens)[:, :2]
    assert torch.equal(first, second)
    smollm2.forget_the_mask(monkeypatch)
    first, second = tiny(tokens)[:, :2]
    assert not torch.isclose(first, second).all(dim=1).any()
    assert min(smollm2.MISTAKES, key=smollm2.MISTAKES.get) is smollm2.forget_the_mask
    assert next(iter(ROWS["5-gpt.md"])).startswith("no causal mask")


def test_without_positions_the_order_of_earlier_tokens_makes_no_difference(tiny, monkeypatch):
    tokens = torch.tensor([[5, 9, 200, 31], [200, 5, 9, 31]])
    first, second = tiny(tokens)[:, -1]
    assert not torch.isclose(first, second).all()
    smollm2.forget_positions(monkeypatch)
    first, second = tiny(tokens)[:, -1]
    torch.testing.assert_close(first, second)


def gradient(add_gradients, world):
    """Return the gradient that DDP would make of those of several processes."""
    text = corpus_of(random_pairs(9))
    model, count = make(), int((text.lengths[:, 1] - 1).sum())
    for rank in range(world):
        add_gradients.__globals__["rank_and_world"] = lambda rank=rank: (rank, world)
        add_gradients(model, text, torch.arange(9), count, SMALL)
    return torch.cat([parameter.grad.flatten() / world for parameter in model.parameters()])


@makes(
    "6-translation.md",
    "each process",
    "not that of the whole batch",
    "changes with the number of processes",
)
def test_a_loss_divided_by_the_tokens_of_each_process_is_not_that_of_the_batch(changed):
    old = "weight = world / count\n"
    new = "weight = 1 / int((corpus.lengths[share, 1] - 1).sum())\n"
    wrong = changed("translation.py", old, new)["add_gradients"]
    right = changed("translation.py", old, old)["add_gradients"]
    expected = gradient(right, 1)
    torch.testing.assert_close(gradient(right, 2), expected)
    torch.testing.assert_close(gradient(wrong, 1), expected)
    assert not torch.allclose(gradient(wrong, 2), expected)
    assert not torch.allclose(gradient(wrong, 3), gradient(wrong, 2))


@makes(
    "6-translation.md",
    "all processes",
    "sets the same numbers to 0 in every process",
)
def test_the_same_random_numbers_in_all_processes_hide_the_same(changed):
    old = "self.derive_seed(progress.step, rank)"
    seeds = []
    for new in (old, old.replace(", rank", "")):
        Run = changed("running/runs.py", old, new)["Run"]
        for rank in (0, 1):
            Run.steps.__globals__["rank_and_world"] = lambda rank=rank: (rank, 1)
            next(Run(None, make(), [], {}, epochs=1).steps([None]))
            seeds.append(torch.initial_seed())
    right, other_right, wrong, other_wrong = seeds
    assert wrong == other_wrong
    assert right != other_right


@makes(
    "6-translation.md",
    "a beam",
    "worse than a translation that was already found",
)
def test_a_beam_that_drops_finished_translations_ends_with_worse_ones(changed):
    old = "better = (ended_score > best_score) & (length <= limit)\n"
    highest = "total[..., 3:].flatten(1).amax(dim=1) / penalty[length]"
    new = old.replace("\n", f" & (ended_score >= {highest})\n")
    wrong, worse = changed("decoding/search.py", old, new)["beam_search"], 0
    for seed in range(8):
        torch.manual_seed(seed)
        model = Transformer(9, Sizes(8, 2, 1, 8)).double().eval()
        nn.init.normal_(model.embedding.weight)
        text = draw([3, 1], vocab_size=9)
        found = [find(model, text, 2, 1.0) for find in (search.beam_search, wrong)]
        for ids, *pair in zip(text, *found, strict=True):
            a, b = (score_of(model, ids, target, 1.0) for target in pair)
            worse += b < a - 1e-9
    assert worse


@makes("6-translation.md", "pairs")
def test_pairs_at_random_fill_a_batch_with_padding(changed, tmp_path, seen):
    old = "order = (lengths.amax(dim=1) + random).argsort(stable=True)"
    wrong = changed("inputs/pairs.py", old, "order = random.argsort()")["make_batches"]
    languages = ("de", "en")
    pairs = [*islice(sample_pairs(languages, "train"), 4000)]
    save_text(tmp_path, {"train": pairs, "val": pairs[:9]})
    folder, _ = corpus.prepare_corpus(tmp_path, languages, 600, tmp_path / "cache")
    lengths = corpus.open_corpus(folder / "train").lengths
    padding = []
    for make_batches in (wrong, corpus.make_batches):
        batches = make_batches(lengths, 2048, torch.Generator().manual_seed(0))
        room = sum(len(rows) * int(lengths[rows].amax(dim=0).sum()) for rows in batches)
        padding.append(100 - 100 * int(lengths.sum()) / room)
    assert padding == pytest.approx(percentages(seen), abs=6)


@pytest.mark.parametrize("page", PAGES)
def test_every_mistake_of_a_page_is_made(page):
    assert MADE[page] == set(ROWS[page])


@pytest.mark.parametrize(("seen", "words"), SAID)
def test_a_row_says_what_its_test_shows(seen, words):
    assert words in seen
