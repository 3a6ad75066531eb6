"""A real model: what it says, and what it would say with each mistake that raises no error.

`make smollm2` fetches it.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt as G
from inputs import pretrained

FOLDER = Path(__file__).parent.parent / "data" / "smollm2"
TEXT = (
    "The capital of France is Paris. The capital of Germany is Berlin. A language model predicts"
    " the next word of a text from all the words before it. It learns this from many books and web"
    " pages. The capital of Italy is"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(FOLDER.glob("*.gguf")), reason="make smollm2 fetches the model"),
]


def ask(model, tokenizer):
    """Return the nats per token of TEXT, without a mark before, and the word after it."""
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    with torch.inference_mode():
        logits = model(ids.unsqueeze(0))[0]
    loss = F.cross_entropy(logits[:-1], ids[1:]).item()
    return loss, tokenizer.decode([int(logits[-1].argmax())])


@pytest.fixture(scope="module")
def opened():
    model, published = G.open_model(FOLDER)
    return model, published.tokenizer


def test_it_knows_the_capital_of_italy(opened):
    loss, word = ask(*opened)
    assert loss == pytest.approx(3.106, abs=0.003)
    assert word == " Rome"


def test_it_writes_and_ends_as_a_person_runs_it(run_script):
    options = ("--model", FOLDER, "--temperature", 0, "--stop", ".")
    done = run_script("gpt.py", "--write", TEXT, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{TEXT} Rome")


# Mistakes, each by one edit. The losses are those of the same edits in another program.


def leave_interleaved(monkeypatch):
    monkeypatch.setattr(pretrained, "put_halves", lambda stored, _: stored)


def change_base(monkeypatch):
    change_sizes(monkeypatch, theta=10_000.0)


def change_epsilon(monkeypatch):
    change_sizes(monkeypatch, epsilon=1e-6)


def change_sizes(monkeypatch, **changes):
    open_published = G.open_published

    def edited(path):
        published = open_published(path)
        return replace(published, settings=published.settings | changes)

    monkeypatch.setattr(G, "open_published", edited)


def forget_positions(monkeypatch):
    monkeypatch.setattr(G, "rotate", lambda x, cos, sin: x)


def change_attention(monkeypatch, edit):
    attend = F.scaled_dot_product_attention

    def edited(Q, K, V, mask, is_causal, enable_gqa):
        return edit(attend, Q, K, V, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", edited)


def tile_heads(monkeypatch):
    def edit(attend, Q, K, V, is_causal):
        times = Q.shape[1] // K.shape[1]
        return attend(Q, K.repeat(1, times, 1, 1), V.repeat(1, times, 1, 1), is_causal=is_causal)

    change_attention(monkeypatch, edit)


def forget_the_scale(monkeypatch):
    def edit(attend, Q, K, V, is_causal):
        return attend(Q, K, V, is_causal=is_causal, scale=1.0, enable_gqa=True)

    change_attention(monkeypatch, edit)


def forget_the_mask(monkeypatch):
    def edit(attend, Q, K, V, is_causal):
        return attend(Q, K, V, enable_gqa=True)

    change_attention(monkeypatch, edit)


MISTAKES = {
    leave_interleaved: 4.257,
    change_base: 3.141,
    change_epsilon: 3.106,
    forget_positions: 5.006,
    tile_heads: 12.168,
    forget_the_scale: 5.562,  # in float64; so steep a softmax multiplies what float32 rounds off
    forget_the_mask: 0.903,  # it looks better: each token sees the one that it should predict
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_raises_an_error_but_the_loss_tells(mistake, monkeypatch):
    mistake(monkeypatch)
    model, published = G.open_model(FOLDER)
    loss, word = ask(model, published.tokenizer)
    assert loss == pytest.approx(MISTAKES[mistake], abs=0.01)
    assert (word == " Rome") == (mistake in (change_base, change_epsilon))
