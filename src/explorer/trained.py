"""The networks that explore.py shows, from runs/ or trained on the spot, and their inputs."""

import importlib
import json
import math
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import attention
import gpt
import transformer
from decoding.sampling import decode_stream
from inputs.dates import find_unseen, normalize, sample_dates, split_days
from inputs.documents import standard_library
from inputs.photo import open_photo, prepare
from inputs.pretrained import Texts
from inputs.text import PAD
from running.shell import open_weights, save_weights

PAIR_STEPS = 500  # as in attention.py
DATE_EPOCHS = 2  # two thirds of transformer.py's
DATE_STEPS = DATE_EPOCHS * transformer.BATCHES
GPT_STEPS = 300  # a seventh of gpt.py's
LONGEST_TEXT = 192  # tokens of a text, so that each control is answered at once
LONGEST_DATE = 60  # characters of a date; those of the 26 languages are shorter
PADS = 4  # behind a date, as if it were in a batch with a longer one
Model = TypeVar("Model")


@contextmanager
def counting(model: nn.Module, tick: Callable[[], object]) -> Iterator[None]:
    """Call `tick` at each call of the model, which training calls once per step."""

    def count(*_: object) -> None:
        tick()

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def save(path: Path, model: nn.Module, about: dict[str, str] | None = None) -> None:
    """Save a network; make its folder if it doesn't exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, about or {})


def train_pairs(path: Path, tick: Callable[[], object], steps: int = PAIR_STEPS) -> None:
    """Train and save the two heads of attention.py."""
    model = attention.PairFinder(2)
    with counting(model, tick):
        attention.train(model, steps)
    save(path, model)


def train_dates(path: Path, tick: Callable[[], object], epochs: int = DATE_EPOCHS) -> None:
    """Train and save the network of transformer.py."""
    days, _, _ = split_days()
    vocabulary = transformer.make_vocabulary(sample_dates(days[:20_000], Random(0)))
    model = transformer.Transformer(4 + len(vocabulary), transformer.Sizes())
    with counting(model, tick):
        list(transformer.train(model, vocabulary, epochs, seed=0))
    save(path, model, {"characters": "".join(vocabulary)})


def train_gpt(path: Path, tick: Callable[[], object], steps: int = GPT_STEPS) -> None:
    """Train and save a network of gpt.py on Python's standard library."""
    settings = gpt.Settings(steps=steps, interval=steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, texts, corpus = gpt.begin(None, standard_library(), settings, folder / "corpus", 0)
        run = gpt.make_run(folder, model, {}, settings, seed=0, save_minutes=math.inf)
        with counting(model, tick):
            gpt.train_epoch(run, model, corpus.tokens, settings)
    gpt.save_model(path, model, texts)


def open_pairs(path: Path) -> attention.PairFinder:
    """Read the two heads that attention.py saved. Raises OSError if `path` is something else."""
    model, _ = open_weights(path, lambda about: attention.PairFinder(2))
    return model.eval()


def open_first(
    paths: Sequence[Path], open_one: Callable[[Path], Model]
) -> tuple[Model | None, str]:
    """Return the first network that opens, or None, and what is wrong with those before it."""
    broken: list[str] = []
    for path in paths:
        try:
            return open_one(path), " ".join(broken)
        except OSError as error:
            broken += [f"{error}."] if path.exists() else []
    return None, " ".join(broken) or f"There is no network in {str(paths[0])!r} yet."


def read_losses(runs: Path) -> dict[str, dict[str, list[float]]]:
    """Return the losses by epoch of all runs, by the names of their folders."""
    losses = {}
    for path in sorted(filter(Path.is_file, runs.glob("*/metrics.json"))):
        try:
            rows = json.loads(path.read_text())["epochs"]
            if isinstance(rows[0], dict):
                names = ["training_loss", "validation_loss"]
            else:  # of transformer.py: loss, accuracy, seconds
                names = ["training_loss"]
                rows = [{"training_loss": row[0]} for row in rows]
            lines = {name: [float(row[name]) for row in rows] for name in names}
        except (OSError, ValueError, LookupError, TypeError):
            continue  # the metrics of something else, or broken ones
        losses[path.parent.name] = lines
    return losses


def classify(content: bytes, path: Path) -> tuple[Tensor, dict[str, float]]:
    """Return what the network in `path` sees of a photo, (28, 28), and its probabilities by class.

    Raises OSError if there is no network, or one that computes no numbers, and ValueError if there
    is no garment in the photo.
    """
    script = importlib.import_module("fashion-mnist")
    model = script.load_model(path)
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo")
        photo.write_bytes(content)
        try:
            image = prepare(open_photo(photo))
        except Exception as error:  # Pillow's decoders fail in many ways on a broken file
            raise ValueError(
                f"This is not a photo of a garment: {error}".partition("\n")[0]
            ) from error
    probabilities = script.predict(model, image.unsqueeze(0)).softmax(dim=1)[0]
    if not probabilities.isfinite().all():
        raise OSError(f"{path}: a network that computes no numbers; train it again")
    return image, dict(zip(script.CLASSES, probabilities.tolist(), strict=True))


def split_words(sentence: str) -> tuple[list[str], str]:
    """Return the words of a sentence, and what is wrong with it."""
    words = [word[:20] for word in unicodedata.normalize("NFC", sentence).split()]
    if 1 <= len(words) <= attention.MAX_WORDS:
        return words, ""
    return [], f"Write 1 to {attention.MAX_WORDS} words; these are {len(words)}."


class Tokens(NamedTuple):
    """A text, and the tokens of it."""

    text: str
    ids: list[int]  # those of the text after the mark
    ends: list[int]  # in the text, of each token but the mark


def longest_text(context: int) -> int:
    """Return how many tokens of a text are read: a quarter of the context stays free after it."""
    return min(LONGEST_TEXT, 3 * context // 4)


def encode_text(text: str, texts: Texts, limit: int) -> tuple[Tokens | None, str]:
    """Return the tokens of a text, up to a limit, and what is wrong with it."""
    encoding = texts.tokenizer.encode(text)
    if not encoding.ids:
        return None, "Write a text of at least one token."
    ends = [end for _, end in encoding.offsets[:limit]]
    tokens = Tokens(text[: ends[-1]], [texts.mark, *encoding.ids[:limit]], ends)
    count = len(encoding.ids)
    return tokens, f"These are the first {limit} of {count:,} tokens." if count > limit else ""


def name_token(token: int, texts: Texts) -> str:
    """Return the characters of a token, or the name of a mark."""
    return texts.tokenizer.decode([token]) or texts.tokenizer.id_to_token(token) or "?"


def spell_text(tokens: Sequence[int], texts: Texts, before: Sequence[int]) -> str:
    """Return the text of tokens that follow others, as gpt.py writes it."""
    return "".join(decode_stream(texts.tokenizer, tokens, before))


def encode_date(text: str, vocabulary: dict[str, int]) -> tuple[Tensor | None, str]:
    """Return a date as a source (1, S) with padding, or None, and what is wrong with it."""
    length = len(normalize(text))
    if not 1 <= length <= LONGEST_DATE:
        return None, f"Write a date of 1 to {LONGEST_DATE} characters; these are {length}."
    tokens = transformer.encode(text, vocabulary).tolist() + [PAD] * PADS
    return torch.tensor([tokens]), find_unseen(text, vocabulary)
