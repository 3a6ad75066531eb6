"""Small runs that show a mistake at work: practice.py tells a mistake by the numbers they return.

`run` calls one in a process of its own. Each gets the module that a mistake may be in, imported
from a folder that has all scripts, and takes a few seconds. exercises.toml names it as the `trial`
of a mistake, and has the names of its numbers in the `symptom`: {loss} with the mistake,
{right.loss} without.
"""

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises import child, gpt_trials

SECONDS = 120  # of a clock
Numbers = dict[str, Any]  # numbers and texts, by the names that a symptom has for them
SAMPLE = Path(__file__).resolve().parents[2] / "data/fashion-mnist-sample"


def run(trial: str, name: str, folder: Path) -> Numbers:
    """Return what a trial finds out about the module `name` of a folder of scripts.

    Raises OSError if it doesn't end, or is killed.
    """
    ended = child.run(try_out, trial, name, folder, seconds=SECONDS)
    if ended.late or not ended.sent:
        raise OSError(f"the small run took more than {SECONDS} s; is the machine busy? Try again")
    numbers: Numbers = ended.sent[0]
    return numbers


def try_out(send: child.Send, trial: str, name: str, folder: Path) -> None:
    """Send what a trial finds out."""
    torch.set_num_threads(1)
    child.forget_sources()
    sys.path.insert(0, str(folder))
    trials = vars(gpt_trials) | globals()
    send(trials[trial](importlib.import_module(name)))


def tell(symptom: str, wrong: Numbers, right: Numbers) -> str:
    """Return the symptom with the numbers of two runs, those with the mistake and those without."""
    return symptom.format(**wrong, right=SimpleNamespace(**right))


def fitted_line(hello: ModuleType) -> Numbers:
    """Fit a line through 100 noisy points; return its slope and intercept, and the warnings."""
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 100)
    y = 0.8 * x + 1.5 + 0.3 * torch.randn(100)
    with warnings.catch_warnings(record=True) as caught:
        slope, intercept = hello.fit_line(x, y, steps=150, learning_rate=0.2)
    return {"slope": slope, "intercept": intercept, "warnings": len(caught)}


def trained_classifier(fashion: ModuleType) -> Numbers:
    """Train a narrow network on 3,000 images; return its loss, and its accuracy on 1,000 others."""
    torch.manual_seed(1)
    images, labels = fashion.load(SAMPLE, "train")
    train = (images[:3000], labels[:3000])
    others = (images[3000:4000], labels[3000:4000])
    model = fashion.Classifier(width=64)
    *_, last = fashion.fit(model, train, others, epochs=6, batch_size=100, learning_rate=6e-3)
    return {"loss": last.training_loss, "accuracy": last.accuracy}


def allowed_places(attention: ModuleType) -> Numbers:
    """Count the places that some words may look at, under both masks.

    There are six places: four words, then two of padding.
    """
    causal = attention.causal_mask(6).sum(dim=1)
    padding = attention.padding_mask(torch.tensor([[7, 5, 8, 7, 0, 0]]), pad=0)[0].expand(6, 6)
    return {
        "first": causal[0].item(),
        "last": causal[-1].item(),
        "word": padding[0].sum().item(),
        "padding": padding[-1].sum().item(),
    }


def weights_of_words(attention: ModuleType) -> Numbers:
    """Return the weights of the first of five words, and the sums of a row and of a column."""
    torch.manual_seed(1)
    Q, K, V = torch.randn(3, 5, 4)
    _, weights = attention.scaled_dot_product_attention(Q, K, V)
    return {
        "row": ", ".join(f"{weight:.2f}" for weight in weights[0].tolist()),
        "sum": weights[0].sum().item(),
        "column": weights[:, 0].sum().item(),
    }


def two_heads(attention: ModuleType) -> Numbers:
    """Train two heads; return how much of their weight is on the mirror image, and to the left.

    For each place, the head that looks there most counts.
    """
    torch.manual_seed(1)
    model = attention.PairFinder(num_heads=2)
    attention.train(model, steps=300)
    digits, _ = attention.sample_sequences(200, unseen=True)
    picture = model.weights(digits).mean(dim=0)  # (H, T, T)
    places = torch.arange(attention.LENGTH)
    mirror = picture[:, places, places.flip(0)].mean(dim=1)
    left = picture[:, places, places - 1].mean(dim=1)
    return {"mirror": mirror.max().item(), "left": left.max().item()}


def one_head(attention: ModuleType) -> Numbers:
    """Train one head, which can't do the task; return the share of sequences it does exactly."""
    torch.manual_seed(1)
    model = attention.PairFinder(num_heads=1)
    attention.train(model, steps=150)
    return {"exact": attention.share_exact(model, count=500)}


def short_training(transformer: Any) -> Numbers:
    """Train a small network on dates for 60 steps; return its loss, and an answer."""
    days, validation_days, test_days = transformer.split_days()
    transformer.split_days = lambda: (days, validation_days[:20], test_days)
    transformer.BATCHES = 60
    transformer.WARMUP = 20
    pairs = transformer.sample_dates(days[:2000], transformer.Random(1))
    vocabulary = transformer.make_vocabulary(pairs)
    torch.manual_seed(1)
    sizes = transformer.Sizes(d_model=32, num_heads=2, num_layers=1, d_ff=64)
    model = transformer.Transformer(4 + len(vocabulary), sizes)
    (epoch,) = transformer.train(model, vocabulary, epochs=1, seed=1)
    return {"loss": epoch.loss, "answer": transformer.read(model, vocabulary, ["7 May 2031"])[0]}


def draw_texts(count: int, length: int) -> list[Tensor]:
    """Draw texts of so many letters, as tokens from 4 on."""
    return list(torch.randint(4, 30, (count, length)))


def train_repeater(transformer: ModuleType) -> Any:
    """Train a small Transformer to repeat texts of letters, of one length in each batch."""
    torch.manual_seed(1)
    sizes = transformer.Sizes(d_model=32, num_heads=2, num_layers=1, d_ff=32)
    model = transformer.Transformer(30, sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(300):
        source, target = batch_of(transformer, draw_texts(64, length=2 + step % 5))
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def batch_of(transformer: ModuleType, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return texts as a batch: sources (B, S), and the same as targets (B, S + 1) after BOS."""
    ended = [F.pad(text, (0, 1), value=transformer.EOS) for text in texts]
    source = transformer.pad_sequence(ended, batch_first=True, padding_value=transformer.PAD)
    return source, F.pad(source, (1, 0), value=transformer.BOS)


def repeated_texts(transformer: ModuleType) -> Numbers:
    """Train a network to repeat texts; return how many it repeats, in a batch and one by one."""
    model = train_repeater(transformer)
    texts = [text for length in range(2, 7) for text in draw_texts(12, length)]
    together = transformer.generate_cached(model, batch_of(transformer, texts)[0], limit=7)
    alone = []
    for text in texts:
        alone += transformer.generate_cached(model, batch_of(transformer, [text])[0], limit=7)
    wanted = [text.tolist() for text in texts]
    lost = [n for n in range(len(texts)) if together[n] != wanted[n]]
    shown = lost[0] if lost else 0
    return {
        "texts": len(texts),
        "together": sum(a == b for a, b in zip(together, wanted, strict=True)),
        "alone": sum(a == b for a, b in zip(alone, wanted, strict=True)),
        "text": spell(wanted[shown]),
        "answer": spell(together[shown]),
    }


def spell(tokens: list[int]) -> str:
    """Return tokens as letters."""
    return "".join(chr(ord("a") + token - 4) if token >= 4 else "?" for token in tokens)
