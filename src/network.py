"""The Transformer of translation.py: its settings and presets, pre-norm, and its file.

The layers of transformer.py put LayerNorm after each sublayer, as the paper does; these put it
before, which trains more easily.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from corpus import open_tokenizer
from transformer import DecoderLayer, EncoderLayer, Sizes, Transformer, write

RANGES: dict[str, tuple[float, float, str]] = {
    "d_model": (1, 4096, "size of the vectors"),
    "num_heads": (1, 64, "heads of each attention"),
    "num_layers": (1, 48, "layers of the encoder, and of the decoder"),
    "d_ff": (1, 16_384, "size inside the feed-forward network"),
    "dropout": (0.0, 0.9, "share of numbers set to 0 in training"),
    "smoothing": (0.0, 0.9, "share of each label spread over all tokens, section 5.4"),
    "norm_first": (False, True, "put LayerNorm before each sublayer, not after it"),
    "vocab_size": (300, 100_000, "tokens in the vocabulary, at most"),
    "batch_tokens": (1, 1_000_000, "tokens per step, source and target, with padding"),
    "part_tokens": (1, 1_000_000, "tokens that a process computes at once"),
    "warmup": (1, 1_000_000, "steps during which the learning rate rises"),
    "epochs": (1, 10_000, "passes over the text"),
    "average": (1, 100, "last epochs whose weights are averaged, section 6.1; with 1, the learning "
                "rate falls to 0 instead"),
}  # fmt: skip


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes of the network and of its training. Raises ValueError if one is out of range."""

    d_model: int = 256
    num_layers: int = 3
    d_ff: int = 512
    dropout: float = 0.3
    smoothing: float = 0.2
    norm_first: bool = True
    vocab_size: int = 6000
    batch_tokens: int = 2048
    part_tokens: int = 8192
    warmup: int = 1200
    epochs: int = 18
    average: int = 1

    def __post_init__(self) -> None:
        """Check the ranges, so that no option or file can ask for an absurd amount of memory."""
        for name, value in asdict(self).items():
            lowest, highest, _ = RANGES[name]
            if not lowest <= value <= highest:
                raise ValueError(f"{flag(name)}: must be between {lowest:,} and {highest:,}")
        if self.d_model % self.num_heads:
            raise ValueError(f"{flag('d_model')}: must be divisible by num_heads {self.num_heads}")


def flag(name: str) -> str:
    """Return the option of a setting."""
    return f"--{name.replace('_', '-')}"


PRESETS = {
    "phrases": Settings(
        d_model=128, num_layers=2, d_ff=256, dropout=0.0, smoothing=0.1,
        vocab_size=600, warmup=400, epochs=1,
    ),
    "small": Settings(),
    "base": Settings(  # table 3 and section 5 of the paper; 18 epochs of WMT 2014 are 100,000 steps
        d_model=512, num_heads=8, num_layers=6, d_ff=2048, dropout=0.1, smoothing=0.1,
        norm_first=False, vocab_size=37_000, batch_tokens=50_000, warmup=4000, epochs=18, average=5,
    ),
}  # fmt: skip


class PreNormEncoderLayer(EncoderLayer):
    """x + dropout(sublayer(LayerNorm(x))) is easier to train when deep (Xiong et al. 2020)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, S, d_model) after the layer; the mask broadcasts to (B, S, S)."""
        h = self.norm1(x)
        x = x + self.dropout(self.self_attention(h, h, h, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class PreNormDecoderLayer(DecoderLayer):
    """The same with attention to the memory, the encoder's output, in between."""

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """Return x (B, T, d_model) after the layer; the memory is (B, S, d_model)."""
        h = self.norm1(x)
        x = x + self.dropout(self.self_attention(h, h, h, mask))
        h = self.norm2(x)
        x = x + self.dropout(self.cross_attention(h, memory, memory, memory_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class PreNormTransformer(Transformer):
    """A Transformer of pre-norm layers; their sums need a final norm."""

    encoder_layer = PreNormEncoderLayer
    decoder_layer = PreNormDecoderLayer

    def __init__(self, vocab_size: int, sizes: Sizes) -> None:
        super().__init__(vocab_size, sizes)
        self.encoder_norm = nn.LayerNorm(sizes.d_model)
        self.decoder_norm = nn.LayerNorm(sizes.d_model)

    def encode(self, source: Tensor) -> Tensor:
        """Return the memory (B, S, d_model) of the source (B, S)."""
        return self.encoder_norm(super().encode(source))

    def to_logits(self, x: Tensor) -> Tensor:
        """Compare x (B, T, d_model) with all embeddings: logits (B, T, V)."""
        return super().to_logits(self.decoder_norm(x))


def make_model(settings: Settings, tokenizer: Tokenizer) -> Transformer:
    """Make a network with random weights."""
    network = PreNormTransformer if settings.norm_first else Transformer
    return network(tokenizer.get_vocab_size(), settings)


@contextmanager
def refusing(path: Path, message: str) -> Iterator[None]:
    """Turn every error into an OSError: a broken or foreign file fails in many ways."""
    try:
        yield
    except torch.OutOfMemoryError:  # says nothing about the file
        raise
    except Exception as error:
        known = isinstance(error, OSError | ValueError)
        reason = str(error).partition("\n")[0] if known else "it is broken, or from another script"
        raise OSError(f"{message}: {path}: {reason}") from error


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write everything needed for translation to one file."""
    about = {"settings": json.dumps(asdict(settings)), "tokenizer": tokenizer.to_str()}
    write(path, safetensors.torch.save(model.state_dict(), about))


def average_weights(model: Transformer, epoch: int, count: int, folder: Path) -> Transformer:
    """Save the weights of an epoch; return a network with the mean of the last `count` epochs'.

    Raises OSError if they can't be written or read.
    """
    last = range(max(1, epoch - count + 1), epoch + 1)
    paths = [folder / f"weights-{n % count}.safetensors" for n in last]
    paths[-1].unlink(missing_ok=True)  # if the write fails, no old epoch's may remain
    write(paths[-1], safetensors.torch.save(model.state_dict()))
    with refusing(folder, "the weights of the last epochs can't be averaged"):
        states = [safetensors.torch.load_file(path) for path in paths]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    average = copy.deepcopy(model)
    average.load_state_dict(mean)
    return average


def open_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read a file that `save_model` wrote. Raises OSError if `path` is not such a file."""
    with refusing(path, "not a model saved by this script; train one first"):
        with safetensors.safe_open(path, "pt") as file:
            about, names = file.metadata(), set(file.keys())
            weights = {name: file.get_tensor(name) for name in names}
        tokenizer = open_tokenizer(about["tokenizer"])
        settings = Settings(**json.loads(about["settings"]))
        with torch.device("meta"):  # takes no memory, whatever the settings say
            expected = make_model(settings, tokenizer).state_dict()
        if any(weights[name].shape != x.shape for name, x in expected.items()):
            raise ValueError("its weights have other sizes than its settings require")
        if not all(x.isfinite().all() for x in weights.values()):
            raise ValueError("some of its weights are not finite")
        model = make_model(settings, tokenizer)
        model.load_state_dict(weights)
    return model, tokenizer
