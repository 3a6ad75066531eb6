"""What several tests share."""

import copy
import gzip
import importlib
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from attention import causal_mask
from inputs.pairs import Corpus
from inputs.text import PAD, make_tokenizer
from transformer import DecoderLayer, Sizes, Transformer
from translation import PreNormTransformer, Settings

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # as many tests run at once as there are cores
os.environ["OMP_NUM_THREADS"] = "1"  # the same in the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

SMALL = Settings(
    d_model=16, num_heads=2, num_layers=1, d_ff=32, dropout=0.0, smoothing=0.3, batch_tokens=200,
    warmup=20, epochs=2,
)  # fmt: skip
SENTENCES = [
    ("ein hund läuft im schnee .", "a dog runs in the snow ."),
    ("zwei kinder spielen im garten .", "two children play in the garden ."),
    ("eine frau liest ein buch .", "a woman reads a book ."),
    ("ein mann mit hut fährt rad .", "a man with a hat rides a bike ."),
]


def make(num_layers=2, dropout=0.0, norm_first=True):
    """Make a network in float64, the same every time, with no parameter at 0 or 1."""
    torch.manual_seed(0)
    network = PreNormTransformer if norm_first else Transformer
    model = network(20, Sizes(16, 2, num_layers, 24, dropout))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.double()


def draw(lengths, vocab_size=20, lowest=3):
    """Draw tokens (B, T) of these lengths, with padding after the end."""
    rows = [torch.randint(lowest, vocab_size, (n,)) for n in lengths]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class Theirs(nn.Module):
    """PyTorch's own Transformer with the weights of ours, and the same things around it."""

    def __init__(self, ours):
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        layer, d_model = ours.encoder[0], ours.embedding.embedding_dim
        self.layers = nn.Transformer(
            d_model, layer.self_attention.num_heads, len(ours.encoder), len(ours.decoder),
            layer.feed_forward[0].out_features, dropout=0.0, batch_first=True,
            norm_first=isinstance(ours, PreNormTransformer),
        )  # fmt: skip
        if not isinstance(ours, PreNormTransformer):  # the paper has no norm at the end
            self.layers.encoder.norm = self.layers.decoder.norm = None
        self.to(ours.positions.dtype)
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)  # the biases of attention, which ours has not, stay so
        with torch.no_grad():
            for parameters, same in self.same(ours):
                same.copy_(torch.cat(parameters))

    def same(self, ours):
        """Yield parameters of ours with the one here that does the same."""
        yield [ours.embedding.weight], self.embedding.weight
        others = [*self.layers.encoder.layers, *self.layers.decoder.layers]
        if isinstance(ours, PreNormTransformer):
            for a, b in (
                (ours.encoder_norm, self.layers.encoder.norm),
                (ours.decoder_norm, self.layers.decoder.norm),
            ):
                yield [a.weight], b.weight
                yield [a.bias], b.bias
        for layer, other in zip([*ours.encoder, *ours.decoder], others, strict=True):
            heads = [(layer.self_attention, other.self_attn)]
            modules = [(layer.feed_forward[0], other.linear1), (layer.norm1, other.norm1)]
            modules += [(layer.feed_forward[2], other.linear2), (layer.norm2, other.norm2)]
            if isinstance(layer, DecoderLayer):
                heads.append((layer.cross_attention, other.multihead_attn))
                modules.append((layer.norm3, other.norm3))
            for a, b in heads:
                yield [a.W_q.weight, a.W_k.weight, a.W_v.weight], b.in_proj_weight
                yield [a.W_o.weight], b.out_proj.weight
            for a, b in modules:
                yield [a.weight], b.weight
                yield [a.bias], b.bias

    def embed(self, tokens):
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return x + self.positions[: tokens.shape[1]]

    def forward(self, source, target):
        # Its masks are True where nothing may be attended to.
        x = self.layers(
            self.embed(source), self.embed(target),
            tgt_mask=~causal_mask(target.shape[1]), src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD, memory_key_padding_mask=source == PAD,
        )  # fmt: skip
        return x @ self.embedding.weight.T


def assert_equals_pytorch(ours):
    """Assert that values and gradients of all parameters are those of nn.Transformer."""
    theirs = Theirs(ours)
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    real = target != PAD
    logits, expected = (model(source, target)[real] for model in (ours, theirs))
    torch.testing.assert_close(logits, expected)
    for values in (logits, expected):
        values.sin().sum().backward()
    same = list(theirs.same(ours))
    assert sum(len(parameters) for parameters, _ in same) == len(list(ours.parameters()))
    for parameters, other in same:
        assert all(parameter.grad.abs().max() > 1e-6 for parameter in parameters)
        torch.testing.assert_close(torch.cat([p.grad for p in parameters]), other.grad)


def watch(layer):
    """Keep the inputs and the output of each module of a layer, by its name, in the next call."""
    seen = {}

    def keep(name):
        def hook(_, inputs, options, output):
            seen[name] = [*inputs, *options.values()], output

        return hook

    for name, module in layer.named_modules():
        module.register_forward_hook(keep(name), with_kwargs=True)
    return seen


def assert_half_dropped(found, x, added):
    """Assert that `found` is x and half of the numbers of `added`, doubled: a dropout of 0.5."""
    kept = torch.isclose(found, x + 2 * added)
    assert (kept | torch.isclose(found, x)).all()
    assert 0.35 < kept.double().mean() < 0.65


def corpus_of(pairs):
    """Make a corpus of pairs of token lists."""
    sides = [ids for pair in pairs for ids in pair]
    tokens = torch.tensor([token for ids in sides for token in ids], dtype=torch.int32)
    return Corpus(tokens, torch.tensor([0, *map(len, sides)]).cumsum(dim=0))


def save_text(folder, splits):
    """Write splits of pairs as parallel text in German and English."""
    for split, pairs in splits.items():
        for language, lines in zip(("de", "en"), zip(*pairs, strict=True), strict=True):
            content = "".join(f"{line}\n" for line in lines).encode()
            (folder / f"{split}.{language}").write_bytes(content)


@pytest.fixture(scope="session")
def words():
    """A tokenizer for SENTENCES."""
    return make_tokenizer((text for pair in SENTENCES for text in pair), 320)


@pytest.fixture
def text_folder(tmp_path):
    """A data set of a few sentences, over and over; some files are gzipped."""
    folder = tmp_path / "some text"
    folder.mkdir()
    save_text(folder, {"train": SENTENCES * 30, "val": SENTENCES[:2]})
    save_text(folder, {"test2016": SENTENCES[2:], "test.more": SENTENCES})
    for path in folder.glob("train.*"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


class Done(NamedTuple):
    """What a script left behind."""

    returncode: int
    stdout: str
    stderr: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """Restore the handlers of signals: a script may let Ctrl-C or a closed pipe end the process."""
    numbers = [signal.SIGINT, *([signal.SIGPIPE] if hasattr(signal, "SIGPIPE") else [])]
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def idx(array: np.ndarray) -> bytes:
    """Pack bytes in the IDX format."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="session")
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """The training split of the sample."""
    fashion = importlib.import_module("fashion-mnist")
    return fashion.load(fashion.SAMPLE, "train")


@pytest.fixture(scope="session")
def files(sample: tuple[torch.Tensor, torch.Tensor]) -> dict[str, bytes]:
    """The files of a data set of 1,200 and 300 images, two of them not gzipped."""
    images, labels = (tensor.numpy() for tensor in sample)
    found = {}
    for name, part in (("train", slice(1200)), ("t10k", slice(1200, 1500))):
        found[f"{name}-images-idx3-ubyte.gz"] = gzip.compress(idx(images[part]))
        found[f"{name}-labels-idx1-ubyte"] = idx(labels[part])
    return found


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    folder = tmp_path / "small data"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def run_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run src/<name> as a person does, but in this process, where PyTorch is imported already."""

    def run(name: str, *arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "src" / name), run_name="__main__")
        return Done(stop.value.code, *capsys.readouterr())

    return run
