#!/usr/bin/env python3
"""A language model like today's open ones learns Python, and is measured as a compressor.

Run `poetry run src/gpt.py`. It builds the network of Llama (Touvron et al. 2023, arXiv 2302.13971)
and trains it on Python's own standard library. A network that predicts a text well can compress
it, so the loss is given in bits per byte, beside those of bz2 and xz. Results go to runs/gpt/.
There, `--write "def "` continues a text, `--bits FILE` shows what surprises the network, and
`--zip FILE` compresses a file. `transformers` opens that folder, too.
"""

import argparse
import bz2
import copy
import lzma
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from decoding.chat import Conversation, Writer
from decoding.sampling import Sampling, decode_stream, next_tokens, until
from decoding.search import autocast
from decoding.zipping import LONGEST_WINDOW, unzip_bytes, zip_bytes
from inputs.documents import (
    Corpus,
    Text,
    Windows,
    longest_shared_runs,
    open_corpus,
    prepare_documents,
    standard_library,
    training_text,
)
from inputs.gguf import Stored
from inputs.pretrained import (
    Published,
    Texts,
    make_config,
    make_tokenizer_config,
    open_published,
    own_texts,
    published_name,
)
from running.processes import (
    alone,
    by_each,
    by_first,
    joined_processes,
    own_parts,
    rank_and_world,
    say,
)
from running.runs import Epoch, Run, check_start, going_on, set_aside
from running.settings import add_settings, check_settings, flag, read_settings, setting
from running.shell import (
    checksum,
    command,
    existing_path,
    first_line,
    is_utf8,
    make_parser,
    number,
    printable,
    refusing,
    typed_lines,
    write,
)

BEFORE_FALL = "checkpoint-before-fall.pt"
RESULTS = (
    BEFORE_FALL, "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
SAMPLES = 20
PYTHON = ("*.py",)  # the files of a folder, unless --glob says otherwise
LONGEST_SAMPLE = 256  # tokens
SAMPLE_TEMPERATURE = 0.8
AT_ONCE = 8192  # tokens that are measured at once
LOGITS = 1 << 23  # computed at once: those of all tokens would fill the memory
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "bz2 -9": lambda content: bz2.compress(content, 9),
    "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}
IGNORED = -100  # the label of padding, which cross_entropy leaves out
LIMITS = {  # of the sizes that a file may name; its weights must have the same sizes
    "vocab_size": 1 << 20, "d_model": 1 << 16, "num_layers": 1000, "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12, "d_k": 1 << 12, "d_ff": 1 << 18, "context": 1 << 24,
}  # fmt: skip


class Scaling(NamedTuple):
    """How Llama 3 slows down rotations, to reach further than in its first training."""

    factor: float
    low: float  # rotations within the first context: fewer are slowed down by `factor`,
    high: float  # more stay as they are
    context: int  # tokens of the first context


@dataclass(frozen=True)
class Sizes:
    """The sizes of a network, and how published ones of its kind differ."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values, each for num_heads / num_kv_heads of queries
    d_k: int  # of each head
    d_ff: int
    context: int  # tokens, at most
    tied: bool  # whether the output shares the embedding's weights
    theta: float = 10_000.0  # the base of the frequencies
    epsilon: float = 1e-5  # of the norms
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Qwen 3
    scaling: Scaling | None = None  # Llama 3
    factors: tuple[float, ...] | None = None  # the divisor of each frequency, in GGUF

    def __post_init__(self) -> None:
        """Raise ValueError if the sizes make no network, as those in a file may."""
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most:,}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} heads of keys can't serve {self.num_heads}")
        if self.d_k % 2:
            raise ValueError(f"d_k {self.d_k} is not even")
        if not 1 < self.theta < math.inf or not 0 < self.epsilon < 1:
            raise ValueError(f"theta is {self.theta!r}, epsilon {self.epsilon!r}")


def frequencies(sizes: Sizes) -> Tensor:
    """Return how far each pair of numbers turns from one position to the next: (d_k / 2,)."""
    frequency = 1 / sizes.theta ** (torch.arange(0, sizes.d_k, 2) / sizes.d_k)
    if sizes.factors is not None:
        return frequency / torch.tensor(sizes.factors)
    if sizes.scaling is None:
        return frequency
    factor, low, high, context = sizes.scaling
    rotations = context * frequency / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn number i of x (B, H, T, d_k), and its partner i + d_k/2, by the angle of its position.

    Equation 34 of Su et al. 2021 (arXiv 2104.09864), whose partners are neighbors; published
    weights have them half a head apart. The angles' cos and sin broadcast to (B, H, T, d_k/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Attention with rotary positions; heads of queries can share keys (Ainslie et al. 2023).

    Of two positions, only the distance affects the product of a query and a key.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d_q = sizes.num_heads * sizes.d_k
        d_kv = sizes.num_kv_heads * sizes.d_k
        self.d_k = sizes.d_k
        self.W_q = nn.Linear(sizes.d_model, d_q, bias=sizes.qkv_bias)
        self.W_k = nn.Linear(sizes.d_model, d_kv, bias=sizes.qkv_bias)
        self.W_v = nn.Linear(sizes.d_model, d_kv, bias=sizes.qkv_bias)
        self.W_o = nn.Linear(d_q, sizes.d_model, bias=False)
        nn.init.zeros_(self.W_o.weight)  # adds nothing at first
        self.norm_q = nn.RMSNorm(sizes.d_k, sizes.epsilon) if sizes.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(sizes.d_k, sizes.epsilon) if sizes.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return what x (B, T, d_model) finds at its own and earlier positions, of the same shape.

        With a `Cache`, keys, values, cos and sin are those of S tokens, the last T of them new.
        """
        projected = self.W_q(x), self.W_k(x), self.W_v(x)
        Q, K, V = (each.unflatten(-1, (-1, self.d_k)).transpose(1, 2) for each in projected)
        T = x.shape[1]
        Q = rotate(self.norm_q(Q), cos[..., -T:, :], sin[..., -T:, :])  # (B, H, T, d_k)
        K = rotate(self.norm_k(K), cos, sin)  # (B, H_kv, S, d_k)
        is_causal = mask is None and T > 1  # the last token alone may attend to all
        output = F.scaled_dot_product_attention(Q, K, V, mask, is_causal=is_causal, enable_gqa=True)
        return self.W_o(output.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): (silu(xW_gate) * xW_up)W_down, where silu(x) = x sigmoid(x)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.W_gate = nn.Linear(sizes.d_model, sizes.d_ff, bias=False)
        self.W_up = nn.Linear(sizes.d_model, sizes.d_ff, bias=False)
        self.W_down = nn.Linear(sizes.d_ff, sizes.d_model, bias=False)
        nn.init.zeros_(self.W_down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., d_model) after the network."""
        return self.W_down(F.silu(self.W_gate(x)) * self.W_up(x))


class Layer(nn.Module):
    """x + sublayer(norm(x)), for attention and feed-forward.

    RMSNorm (Zhang and Sennrich 2019) divides by √mean(x²), and subtracts no mean.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.feed_forward = FeedForward(sizes)
        self.norm1 = nn.RMSNorm(sizes.d_model, sizes.epsilon)
        self.norm2 = nn.RMSNorm(sizes.d_model, sizes.epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return x (B, T, d_model) after the layer."""
        x = x + self.attention(self.norm1(x), cos, sin, mask)
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """A decoder without encoder: it predicts each next token of a text from all before it.

    At first, sublayers add nothing; unless the output is tied, all tokens are equally likely.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = nn.RMSNorm(sizes.d_model, sizes.epsilon)
        self.to_logits = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
        nn.init.zeros_(self.to_logits.weight)
        if sizes.tied:
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.to_logits.weight = self.embedding.weight

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return what the network knows after each of the tokens (B, T): (B, T, d_model).

        Positions are (S,) or (B, S), by default from 0. The boolean mask, True where a token may
        attend, broadcasts to (B, T, S); later tokens are always hidden. S is T, or with a `Cache`
        the number of all tokens so far.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        S = positions.shape[-1]
        if mask is not None or 1 < T < S:
            causal = torch.ones(T, S, dtype=torch.bool, device=tokens.device).tril(S - T)
            mask = causal if mask is None else (causal & mask).unsqueeze(1)  # (B, 1, T, S)
        x = self.embedding(tokens)
        angle = positions.unsqueeze(-1) * frequencies(self.sizes).to(tokens.device)
        if angle.dim() == 3:
            angle = angle.unsqueeze(1)  # (B, 1, S, d_k / 2): alike for all heads
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the logits (B, T, V) of the token after each one of the tokens (B, T)."""
        return self.to_logits(self.hidden(tokens, positions, mask))


class LoRA(nn.Module):
    """W x + B A x, where W stays as it is, and A and B are small (Hu et al. 2021).

    B starts at 0, so at first nothing changes.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Linear(linear.in_features, rank, bias=False)
        self.B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., in_features) after both: (..., out_features)."""
        return self.linear(x) + self.B(self.A(x))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Add B A to W; return that linear layer, which then does the same alone."""
        self.linear.weight += self.B.weight @ self.A.weight
        return self.linear


def parts_of_layers(model: GPT) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the modules of the sublayers: for each, its owner, its name there, and itself."""
    owners = [owner for layer in model.layers for owner in layer.children()]
    return [(owner, name, part) for owner in owners for name, part in owner.named_children()]


def add_lora(model: GPT, rank: int) -> None:
    """Let only LoRA's small matrices learn, beside each matrix of the layers."""
    model.requires_grad_(False)
    for owner, name, part in parts_of_layers(model):
        if isinstance(part, nn.Linear):
            setattr(owner, name, LoRA(part, rank).to(part.weight.device))


def merge_lora(model: GPT) -> GPT:
    """Return the network with LoRA's matrices added to those beside them; itself without LoRA."""
    if not any(isinstance(module, LoRA) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for owner, name, part in parts_of_layers(merged):
        if isinstance(part, LoRA):
            setattr(owner, name, part.merge())
    return merged


def published_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights by their names in model.safetensors; a tied output has none there."""
    weights = model.state_dict()
    if model.sizes.tied:
        del weights["to_logits.weight"]
    return {published_name(name): tensor for name, tensor in weights.items()}


def save_model(folder: Path, model: GPT, texts: Texts) -> None:
    """Save a network and its tokenizer in a folder that `transformers` opens.

    Raises OSError if config.json has no place for one of its sizes.
    """
    config = make_config(asdict(model.sizes), texts)
    weights = published_weights(model)
    about = {"format": "pt", "crc32": checksum(weights)}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", safetensors.torch.save(weights, about))
    write(folder / "config.json", config)
    write(folder / "tokenizer.json", texts.tokenizer.to_str().encode())
    write(folder / "tokenizer_config.json", make_tokenizer_config(texts, model.sizes.context))


def check_tensors(found: dict[str, Stored], wanted: dict[str, Tensor]) -> None:
    """Raise ValueError unless these are the tensors that are wanted, with their shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    lacking = shapes.keys() - found.keys()
    unknown = found.keys() - shapes.keys()
    for what, names in (("it lacks", lacking), ("unknown are", unknown)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            raise ValueError(
                f"its weights have other sizes than its settings require: {what} {some}"
            )
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(
                f"its weights have other sizes than its settings require: {name} is of shape"
                f" {found[name].shape}, not {shape}"
            )


def open_model(path: Path) -> tuple[GPT, Published]:
    """Open a folder that this script or `transformers` has saved, or a GGUF file.

    Return the network, and what else its files hold. Sizes are compared before a weight is read, so
    that no file can ask for more memory than its own size. Raises OSError if a file is missing,
    broken, or of another kind of network.
    """
    with refusing(path, "not a language model that this script can open"):
        published = open_published(path)
        settings = published.settings
        if settings.get("scaling"):
            settings = settings | {"scaling": Scaling(*settings["scaling"])}
        sizes = Sizes(**settings)
        with torch.device("meta"):  # takes no memory, whatever the file says
            model = GPT(sizes)
        wanted = model.state_dict()
        if sizes.tied:
            del wanted["to_logits.weight"]
        check_tensors(published.tensors, wanted)
        if max(published.tokenizer.get_vocab().values()) >= sizes.vocab_size:
            raise ValueError("its tokenizer has more tokens than the network")
        # The largest first, while most memory is free: reading a tensor takes more than its size.
        order = sorted(wanted, key=lambda name: wanted[name].numel(), reverse=True)
        weights = {name: published.tensors[name].read() for name in order}
        # A NaN in a tensor makes both limits NaN; isfinite() would take the tensor's size again.
        limits = [limit for tensor in weights.values() for limit in tensor.aminmax()]
        if not all(limit.isfinite() for limit in limits):
            raise ValueError("some of its weights are not finite")
        named = {published_name(name): tensor for name, tensor in weights.items()}
        if published.crc32 is not None and published.crc32 != checksum(named):
            raise ValueError("it is broken: its checksum is wrong")
        model.load_state_dict(weights, strict=False, assign=True)
        if sizes.tied:
            model.to_logits.weight = model.embedding.weight
    return model, published


@dataclass(frozen=True)
class Settings:
    """Sizes of the network, and of its training. Raises ValueError if one is out of range."""

    d_model: int = setting(128, 2, 8192, "size of the vectors")
    num_layers: int = setting(4, 1, 200, "layers")
    num_heads: int = setting(4, 1, 128, "heads of queries")
    num_kv_heads: int = setting(4, 1, 128, "heads of keys and values")
    d_ff: int = setting(352, 1, 65_536, "size inside the feed-forward network")
    context: int = setting(256, 2, 1_000_000, "tokens, at most")
    tied: bool = setting(False, False, True, "let the output share the embedding's weights")
    vocab_size: int = setting(1024, 257, 1_000_000, "tokens in the vocabulary, at most")
    lora_rank: int = setting(0, 0, 4096, "with --model: of LoRA; 0: all weights learn")
    steps: int = setting(2050, 1, 100_000_000, "steps of training")
    interval: int = setting(410, 1, 10_000_000, "steps between validations")
    batch_size: int = setting(8, 1, 100_000, "windows of the text per step")
    part_size: int = setting(64, 1, 100_000, "windows that a process computes at once")
    compiled: bool = setting(False, False, True, "compile the network: faster, with a C++ compiler")
    muon: bool = setting(True, False, True, "train matrices by Muon, not by AdamW")
    matrix_rate: float = setting(0.02, 0.0, 10.0, "learning rate of the layers' matrices")
    learning_rate: float = setting(0.02, 0.0, 10.0, "learning rate of all else")
    weight_decay: float = setting(0.0, 0.0, 10.0, "of the layers' matrices")
    clip: float = setting(0.0, 0.0, 1e6, "longest gradient; 0: any")
    warmup: int = setting(20, 1, 1_000_000, "steps during which the rates rise")
    falling: float = setting(0.7, 0.01, 1.0, "share of the steps during which the rates fall to 0")

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self)
        if self.d_model % (2 * self.num_heads):
            raise ValueError(f"{flag('d_model')}: must be divisible by 2 * num_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{flag('num_heads')}: must be divisible by num_kv_heads")

    def sizes(self, vocab_size: int) -> Sizes:
        """Return the sizes of the network."""
        return Sizes(
            vocab_size, self.d_model, self.num_layers, self.num_heads, self.num_kv_heads,
            self.d_model // self.num_heads, self.d_ff, self.context, self.tied,
        )  # fmt: skip

    @property
    def fall(self) -> int:
        """The step at which the rates begin to fall."""
        return round(self.steps * (1 - self.falling))


PRESETS = {
    "tiny": Settings(),
    "small": Settings(
        d_model=256, num_layers=4, num_heads=8, num_kv_heads=8, d_ff=704, context=512,
        vocab_size=4096, steps=4600, interval=920, compiled=True, weight_decay=0.1, clip=1.0,
    ),
    "base": Settings(  # GPT-2 (Radford et al. 2019), but 50,257 tokens slow down a GPU
        d_model=768, num_layers=12, num_heads=12, num_kv_heads=12, d_ff=2048, context=1024,
        tied=True, vocab_size=50_304, steps=20_000, interval=500, batch_size=512, part_size=32,
        compiled=True, learning_rate=0.003, weight_decay=0.1, clip=1.0, warmup=500, falling=0.4,
    ),
    "tune": Settings(
        steps=100, interval=50, batch_size=4, muon=False, matrix_rate=1e-4, learning_rate=1e-4,
        warmup=10, falling=1.0,
    ),
    "lora": Settings(
        lora_rank=16, steps=100, interval=50, batch_size=4, muon=False, matrix_rate=1e-3,
        learning_rate=1e-3, warmup=10, falling=1.0,
    ),
}  # fmt: skip
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff", "tied", "vocab_size")
CONDITIONS = ("steps", "falling", "part_size", "compiled")  # may change as a run is resumed


def check_length(corpus: Corpus, context: int) -> None:
    """Raise OSError if the text for training is shorter than a window."""
    length = len(corpus.tokens)
    if length <= context:
        raise OSError(f"the text has {length:,} tokens: too few for a context of {context:,}")


def make_optimizers(model: GPT, settings: Settings) -> list[Optimizer]:
    """Return Muon, or AdamW, for the layers' matrices that learn, and AdamW for all else that does.

    Muon (Jordan et al. 2024) makes a matrix's step equally long in every direction.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [W for W in model.layers.parameters() if W.requires_grad and W.dim() == 2]
    others = [p for p in learning if all(p is not W for W in matrices)]
    decay = settings.weight_decay
    first: Optimizer
    if settings.muon:
        first = torch.optim.Muon(matrices, momentum=0.95, weight_decay=decay)
    else:
        first = torch.optim.AdamW(matrices, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    if not others:
        return [first]
    second = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [first, second]


def set_rates(optimizers: Sequence[Optimizer], step: int, settings: Settings) -> None:
    """Set the learning rates of a step: they rise, stay constant, and fall to 0."""
    rising = (step + 1) / settings.warmup
    falling = (1 - step / settings.steps) / settings.falling
    factor = min(1.0, rising, falling)
    rates = (settings.matrix_rate, settings.learning_rate)
    for optimizer, rate in zip(optimizers, rates, strict=False):  # with LoRA, there is only one
        optimizer.param_groups[0]["lr"] = rate * factor


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of the tokens of windows (B, T + 1) but the first."""
    logits = model(windows[:, :-1])
    labels = windows[:, 1:]  # shifted by one: after each token comes the next
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def steps_of(first: int, epoch: int, settings: Settings) -> range:
    """Return the steps of an epoch, up to its validation, from its first one on.

    In a lengthened run, an epoch may begin early: where the shorter run ended.
    """
    return range(first, min((epoch + 1) * settings.interval, settings.steps))


def check_compiler(settings: Settings, device: torch.device) -> None:
    """Raise OSError if the network should be compiled, but PyTorch can't, as without a compiler."""
    if settings.compiled:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        except RuntimeError as error:
            reason = first_line(error)
            raise OSError(f"PyTorch can't compile here; use --no-compiled: {reason}") from error


def train_epoch(run: Run[GPT], model: nn.Module, tokens: Tensor, settings: Settings) -> None:
    """Train from the checkpoint on to the next validation.

    A window may cross from one document into the next; the mark between them says so. Each of
    several processes takes its share of a batch, in parts that fit into memory.
    """
    model.train()
    width = settings.context + 1
    order = Windows(len(tokens), width, run.seed)
    loss_of = torch.compile(next_token_loss) if settings.compiled else next_token_loss
    first = run.progress.step - run.progress.batch
    for step in run.steps(steps_of(first, run.progress.epoch, settings)):
        if step == settings.fall > 0:
            run.keep(BEFORE_FALL)
        set_rates(run.optimizers, step, settings)
        starts = order.draw(step * settings.batch_size, settings.batch_size)
        model.zero_grad()
        total = torch.zeros((), device=run.device)
        for part, weight in own_parts(model, starts, settings.part_size):
            windows = tokens[part.unsqueeze(1) + torch.arange(width)].to(run.device)  # (B, T + 1)
            with autocast(run.device):
                loss = loss_of(model, windows.long()) * weight
            loss.backward()
            total += loss.detach()
        if settings.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in run.optimizers:
            optimizer.step()
        run.add(total, rank_and_world()[1])


@torch.inference_mode()
def measure_bits(model: GPT, documents: Sequence[Tensor]) -> Tensor:
    """Return how many bits each token costs, -log2 of its probability, except the marks.

    The tokens of all documents stand end to end. A document is cut into windows of the context's
    size, LONGEST_WINDOW at most, which don't overlap: at the start of one, the network knows only
    the token before.
    """
    model.eval()
    context = min(model.sizes.context, LONGEST_WINDOW)
    count = max(1, AT_ONCE // context)
    size = LOGITS // model.sizes.vocab_size
    device = model.embedding.weight.device
    inputs = [part for ids in documents for part in ids[:-1].split(context)]
    labels = [part for ids in documents for part in ids[1:].split(context)]
    bits = [torch.zeros(0)]
    for start in range(0, len(inputs), count):
        rows = slice(start, start + count)
        tokens = pad_sequence(inputs[rows], batch_first=True).to(device)
        label = pad_sequence(labels[rows], batch_first=True, padding_value=IGNORED).to(device)
        real = label != IGNORED
        known = model.hidden(tokens)[real].split(size)  # of some tokens, (N, d_model)
        for x, next_token in zip(known, label[real].split(size), strict=True):
            nats = F.cross_entropy(model.to_logits(x), next_token, reduction="none")
            bits.append(nats.cpu() / math.log(2))
    return torch.cat(bits).double()


def validate(run: Run[GPT], corpus: Corpus, texts: Texts) -> float:
    """Save the network; return its mean loss on held-out documents, in nats per token.

    Raises FloatingPointError if that is not finite.
    """
    loss = measure_bits(run.model, corpus.held_out).mean().item() * math.log(2)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss became {loss}; lower rates may help")
    with going_on(strict=run.in_last_epoch):
        save_model(run.out, merge_lora(run.model), texts)
    return loss


def train(run: Run[GPT], corpus: Corpus, texts: Texts, settings: Settings) -> Iterator[Epoch]:
    """Train to the last epoch; yield the numbers of each epoch once they are saved."""
    model: nn.Module = run.model
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    with run.stoppable():
        while not run.ended:
            train_epoch(run, model, corpus.tokens, settings)
            loss = by_first(lambda: validate(run, corpus, texts))
            run.end_epoch(loss)
            yield run.progress.rows[-1]


def compress(content: bytes, given: bytes = b"") -> dict[str, float]:
    """Return the bits per byte that compressors need, alone and given another content before."""
    texts = (content, given + content, given) if given else (content,)
    with ThreadPoolExecutor() as pool:
        futures = {
            name: [pool.submit(method, text) for text in texts]
            for name, method in COMPRESSORS.items()
        }
    bits = 8 / len(content)
    found = {}
    for name, those in futures.items():
        size, *sizes = (len(future.result()) for future in those)
        found[name] = bits * size
        if given:
            size_of_both, size_of_given = sizes
            found[f"{name}, given the training files"] = bits * (size_of_both - size_of_given)
    return found


def sample(model: GPT, texts: Texts, count: int, seed: int) -> list[str]:
    """Return texts that the network writes after the mark, of LONGEST_SAMPLE tokens at most."""
    prompts = [[texts.mark]] * count
    seeds = range(seed, seed + count)
    length = min(model.sizes.context, LONGEST_SAMPLE)
    sampling = Sampling(SAMPLE_TEMPERATURE)
    columns = next_tokens(model, prompts, sampling, seeds, length, end=texts.mark)
    ends = {None, *texts.ends}
    rows = [
        [*takewhile(lambda token: token not in ends, row)] for row in zip(*columns, strict=True)
    ]
    return [texts.tokenizer.decode(row) for row in rows]


def save_results(
    run: Run[GPT], corpus: Corpus, texts: Texts
) -> tuple[float, dict[str, float], list[str]]:
    """Save and return the bits per byte, those of compressors, and samples.

    Compressors are given the start of the training files, with which samples are compared, too. It
    is all of them, if they are short; metrics.json has its size.
    """
    bits = measure_bits(run.model, corpus.held_out).sum().item() / corpus.held_out_bytes
    held_out = "".join(texts.tokenizer.decode(ids[1:].tolist()) for ids in corpus.held_out)
    training = training_text(corpus, texts.tokenizer)
    given = training.encode()
    compressors = compress(held_out.encode(), given)
    written = sample(run.model, texts, SAMPLES, run.seed)
    shared = longest_shared_runs(written, training)
    samples = [
        {"text": text, "longest_shared_run": length}
        for text, length in zip(written, shared, strict=True)
    ]
    run.save_metrics(
        bits_per_byte=bits,
        held_out_bytes=corpus.held_out_bytes,
        training_bytes=corpus.training_bytes,
        training_bytes_given=len(given),
        compressors=compressors,
        samples=samples,
    )
    return bits, compressors, written


def show_sizes(run: Run[GPT], corpus: Corpus) -> None:
    """Print the sizes of network and text."""
    if corpus.left_out:
        say(f"left out: {corpus.left_out}")
    count = sum(p.numel() for p in run.model.parameters())
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    print(f"{count:,} parameters on {run.device}, {len(corpus.tokens):,} tokens")
    if learning < count:
        print(f"{learning:,} of the parameters learn")
    print("\nsteps  training loss  validation loss  bits per byte  seconds", flush=True)


def show_training(run: Run[GPT], corpus: Corpus, texts: Texts, settings: Settings) -> None:
    """Train; in the first process, print sizes, and the results of each epoch as it ends."""
    rank, _ = rank_and_world()
    if rank == 0:
        show_sizes(run, corpus)
    held_out = sum(len(ids) - 1 for ids in corpus.held_out)
    bits_per_nat = held_out / corpus.held_out_bytes / math.log(2)
    for _, training, validation, seconds in train(run, corpus, texts, settings):
        bits = validation * bits_per_nat
        if rank == 0:
            print(
                f"{run.progress.step:5}  {training:13.4f}  {validation:15.4f}  {bits:13.4f}"
                f"  {seconds:7.1f}",
                flush=True,
            )


def show_compressors(bits: float, compressors: dict[str, float]) -> None:
    """Print the bits per byte of the network and of compressors."""
    print(f"{bits:7.3f}  this network")
    for name, needed in compressors.items():
        print(f"{needed:7.3f}  {name}")


def printable_lines(text: str) -> str:
    """Replace what could steer a terminal, but not line breaks and tabs."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def show_results(run: Run[GPT], corpus: Corpus, texts: Texts) -> None:
    """Measure the network; print bits per byte, and three samples."""
    bits, compressors, written = save_results(run, corpus, texts)
    print(f"\nBits per byte of {corpus.held_out_bytes:,} bytes that were held out")
    show_compressors(bits, compressors)
    for text in written[:3]:
        print(f"\n--- a sample at temperature {SAMPLE_TEMPERATURE}\n{printable_lines(text)}")


def show_writing(
    model: GPT, published: Published, prompt: str, sampling: Sampling, seed: int, stop: str | None
) -> None:
    """Print a prompt and its continuation, up to an end token or the end of the context."""
    context = model.sizes.context
    tokenizer = published.tokenizer
    mark = published.mark
    ids = [mark, *tokenizer.encode(prompt).ids]
    if len(ids) >= context:
        raise OSError(f"the prompt has {len(ids) - 1:,} tokens; at most {context - 2:,} fit")
    written: list[int] = []

    def tokens() -> Iterator[int]:
        for (token,) in next_tokens(model, [ids], sampling, [seed], context, end=mark):
            if token is None or token in published.ends:
                return
            written.append(token)
            yield token

    pieces = decode_stream(tokenizer, tokens(), ids)
    print(printable_lines(prompt), end="", flush=True)
    for piece in until(pieces, stop) if stop else pieces:
        print(printable_lines(piece), end="", flush=True)
    print()
    if len(ids) + len(written) == context:
        say(f"stopped at {context:,} tokens: the network takes no more")


def show_answer(
    writer: Writer, tokenizer: Tokenizer, conversation: Conversation, prompt: list[int], seed: int
) -> None:
    """Print an answer as it is written; even a part of it joins the conversation."""
    written = ""
    try:
        for piece in decode_stream(tokenizer, writer.write(prompt, seed)):
            written += piece
            print(printable_lines(piece), end="", flush=True)
    finally:
        conversation.answer(written)
        print(flush=True)
    if len(writer.tokens) == writer.context:
        say(f"stopped at {writer.context:,} tokens: the network takes no more")


def show_chat(model: GPT, published: Published, sampling: Sampling, seed: int) -> None:
    """Answer each line that a person types, until they end the talk."""
    if published.template is None:
        raise OSError("the model has no chat template: it was not made to talk; use --write")
    context = model.sizes.context
    most = context - context // 4  # the rest is for the answer
    tokenizer = published.tokenizer
    conversation = Conversation(published.template, tokenizer, published.names)
    with Writer(model, sampling, context, published.ends | {published.mark}) as writer:
        for turn, line in enumerate(typed_lines()):
            with suppress(KeyboardInterrupt):  # ends the answer, not the talk
                try:
                    prompt = conversation.ask(line, most)
                except OSError as error:
                    say(error)
                else:
                    chance = Random(f"{seed} {turn}").getrandbits(63)
                    show_answer(writer, tokenizer, conversation, prompt, chance)


def shade(bits: float) -> str:
    """Return a sign for what a token costs: up to 1 bit, 2, 4, 8, and more."""
    return " ░▒▓█"[sum(bits > limit for limit in (1, 2, 4, 8))]


def show_bits(model: GPT, published: Published, path: Path) -> None:
    """Print a text with a shade below each character, and its bits per byte."""
    content = read_plain(path)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise OSError(f"{path} is not UTF-8") from None
    if not text:
        raise OSError(f"{path} is empty")
    encoding = published.tokenizer.encode(text)
    if published.tokenizer.decode(encoding.ids) != text:
        say(f"parts of {path} have no tokens, so their cost is not counted")
    bits = measure_bits(model, [torch.tensor([published.mark, *encoding.ids])])
    shades = [" "] * len(text)
    for (start, end), cost in zip(encoding.offsets, bits.tolist(), strict=True):
        shades[start:end] = shade(cost) * (end - start)
    start = 0
    for line in text.split("\n"):
        print(printable(line.replace("\t", " ")))
        print("".join(shades[start : start + len(line) + 1]).rstrip())
        start += len(line) + 1
    print(f"{len(bits):,} tokens, {bits.sum():,.0f} bits; bits per byte of {len(content):,} bytes:")
    show_compressors(bits.sum().item() / len(content), compress(content))


def show_duration(seconds: float) -> None:
    """Say how long something will take."""
    duration = f"{math.ceil(seconds)} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    say(f"this takes {duration} at most")


def read_plain(path: Path) -> bytes:
    """Read a file. Raises OSError if it is a folder, or a pipe, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a plain file")
    return path.read_bytes()


def check_free(path: Path, force: bool) -> None:
    """Raise OSError if a file is there that must not be replaced, or none can be written."""
    if path.is_dir():
        raise OSError(f"{path} is a folder")
    if not force and os.path.lexists(path):
        raise OSError(f"{path} is there already; --force replaces it")
    probe = path.with_name(f".{path.name}.{os.getpid()}.part")  # the name that `write` will take
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"can't write {path}: {error.strerror}") from error


def show_zipping(model: GPT, published: Published, path: Path, force: bool) -> None:
    """Write FILE.z; print its size beside those of compressors."""
    content = read_plain(path)
    target = path.with_name(f"{path.name}.z")
    check_free(target, force)
    tokenizer = published.tokenizer
    zipped = zip_bytes(model, tokenizer, published.mark, content, show_duration)
    check_free(target, force)
    write(target, zipped)
    print(f"{len(content):11,} bytes  {printable(path)}")
    print(f"{len(zipped):11,} bytes  {printable(target)}")
    for name, method in COMPRESSORS.items():
        print(f"{len(method(content)):11,} bytes  {name}")


def show_unzipping(model: GPT, published: Published, path: Path, force: bool) -> None:
    """Write the file from which FILE.z was made, as FILE."""
    target = Path(str(path).removesuffix(".z"))
    if path.suffix != ".z" or not target.name:
        raise OSError(f"{path} is no zipped file: its name must end in .z")
    check_free(target, force)
    zipped = read_plain(path)
    tokenizer = published.tokenizer
    with refusing(path, "can't unzip"):
        content = unzip_bytes(model, tokenizer, published.mark, zipped, show_duration)
    check_free(target, force)
    write(target, content)
    print(f"{len(content):11,} bytes  {printable(target)}")


def prompt(text: str) -> str:
    """Parse --write and --stop."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if not is_utf8(text):
        raise argparse.ArgumentTypeError("must be UTF-8")
    return text


def uses_model(args: argparse.Namespace) -> bool:
    """Return whether a network is used, and none is trained."""
    return args.chat or any(x is not None for x in (args.write, args.bits, args.zip, args.unzip))


def make_options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(__doc__, "gpt")
    add = parser.add_argument
    once = parser.add_mutually_exclusive_group().add_argument
    use = parser.add_mutually_exclusive_group().add_argument
    add("--data", type=existing_path, metavar="PATH", help="folder, file or .jsonl to learn from")
    add("--glob", action="append", metavar="PATTERN", help="files of the folder, such as '*.md'")
    once("--resume", action="store_true", help="continue from a checkpoint, if there is one")
    once("--restart", action="store_true", help="begin anew; old results move to previous/")
    add("--save-minutes", type=number(0.0, 1e6), default=10.0, help="between checkpoints")
    use("--write", type=prompt, metavar="TEXT", help="continue a text and exit")
    use("--chat", action="store_true", help="answer each line that is typed, until Ctrl-D")
    use("--bits", type=Path, metavar="FILE", help="show what each token of a text costs and exit")
    use("--zip", type=Path, metavar="FILE", help="compress a file as FILE.z and exit")
    use("--unzip", type=Path, metavar="FILE.z", help="write the file that was compressed and exit")
    add("--model", type=Path, metavar="PATH", help="folder or .gguf file of a model")
    add("--temperature", type=number(0.0, 100.0), default=0.8, help="of drawing; 0: the likeliest")
    add("--top-k", type=number(0, 10_000_000), default=0, help="draw from the k likeliest; 0: all")
    add("--top-p", type=number(1e-9, 1.0), default=1.0, help="the likeliest that add up to p")
    add("--stop", type=prompt, metavar="TEXT", help="end the continuation before this text")
    add("--force", action="store_true", help="let --zip and --unzip replace a file")
    add("--preset", choices=PRESETS, help="set of settings; tune with --model, else tiny")
    add_settings(parser, PRESETS)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line; the settings begin as those of a preset."""
    parser = make_options()
    args = parser.parse_args(argv)
    if args.glob and (args.data is None or args.data.is_file()):
        parser.error("argument --glob: needs a folder in --data")
    trained_on = args.model is not None and not uses_model(args)
    preset = PRESETS[args.preset or ("tune" if trained_on else "tiny")]
    for name in SIZES if trained_on else ():
        if name in args:
            parser.error(f"argument {flag(name)}: not allowed with argument --model")
    if trained_on and args.data is None:
        parser.error("argument --model: needs --write, --chat, --bits, --zip, --unzip or --data")
    if args.stop is not None and args.write is None:
        parser.error("argument --stop: needs --write")
    if args.force and args.zip is None and args.unzip is None:
        parser.error("argument --force: needs --zip or --unzip")
    try:
        settings = read_settings(args, preset)
    except ValueError as error:
        parser.error(f"argument {error}")
    if settings.lora_rank > 0 and not trained_on:
        parser.error("argument --lora-rank (which is not 0 in the preset lora): needs --model")
    if trained_on and args.out.resolve() in (args.model.resolve(), *args.model.resolve().parents):
        parser.error("argument --out: must be another folder than that of --model")
    return args, settings


def begin_anew(text: Text, settings: Settings, cache: Path, seed: int) -> tuple[GPT, Texts, Corpus]:
    """Learn a tokenizer and encode the text; return them and a network with random weights."""
    folder = by_first(lambda: prepare_documents(text, settings.vocab_size, cache))
    corpus, tokenizer = by_each(lambda: open_corpus(folder))
    torch.manual_seed(seed)
    model = GPT(settings.sizes(tokenizer.get_vocab_size()))
    return model, own_texts(tokenizer), corpus


def go_on(path: Path, text: Text, cache: Path) -> tuple[GPT, Texts, Corpus]:
    """Open a published network, and encode the text for it."""
    model, texts = by_each(lambda: open_model(path))
    make_config(asdict(model.sizes), texts)  # refuses now what could not be saved after training
    tokenizer = texts.tokenizer
    size = tokenizer.get_vocab_size()
    folder = by_first(lambda: prepare_documents(text, size, cache, tokenizer, texts.mark))
    corpus, _ = by_each(lambda: open_corpus(folder))
    return model, texts, corpus


def begin(
    path: Path | None, text: Text, settings: Settings, cache: Path, seed: int
) -> tuple[GPT, Texts, Corpus]:
    """Return the network to train, its tokenizer and marks, and the text as tokens.

    Raises OSError if the text is too short for a window, or a window too long for the network.
    """
    model, texts, corpus = (
        go_on(path, text, cache) if path else begin_anew(text, settings, cache, seed)
    )
    if settings.context > model.sizes.context:
        raise OSError(f"{path} takes {model.sizes.context:,} tokens at most: lower --context")
    check_length(corpus, settings.context)
    return model, texts, corpus


def identify(model: GPT, published: bool, corpus: Corpus, settings: Settings) -> dict[str, Any]:
    """Return what must stay the same when a run is resumed, besides the seed."""
    fixed: dict[str, Any] = {"text": corpus.digest} | asdict(settings)
    for name in CONDITIONS:
        del fixed[name]
    if published:
        for name in SIZES:  # those of the published network count
            del fixed[name]
        fixed["model"] = checksum(published_weights(model))
    return fixed


def make_run(
    out: Path,
    model: GPT,
    fixed: dict[str, Any],
    settings: Settings,
    seed: int,
    save_minutes: float = 10.0,
) -> Run[GPT]:
    """Return the run that trains a network, with its optimizers and, if it is set, LoRA."""
    if settings.lora_rank > 0:
        torch.manual_seed(seed)
        add_lora(model, settings.lora_rank)
    optimizers = make_optimizers(model, settings)
    epochs = math.ceil(settings.steps / settings.interval)
    values = asdict(settings)
    conditions = {name: values[name] for name in CONDITIONS}
    return Run(out, model, optimizers, fixed, epochs, seed, conditions, save_minutes)


def use_model(args: argparse.Namespace) -> None:
    """Write, talk, measure, zip or unzip with a network that was trained or published."""
    model, published = open_model(args.model or args.out)
    model.to(args.device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    if args.write is not None:
        show_writing(model, published, args.write, sampling, args.seed, args.stop)
    elif args.chat:
        show_chat(model, published, sampling, args.seed)
    elif args.bits is not None:
        show_bits(model, published, args.bits)
    elif args.zip is not None:
        show_zipping(model, published, args.zip, args.force)
    else:
        show_unzipping(model, published, args.unzip, args.force)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or use what was trained; return the exit status."""
    started = time.perf_counter()
    args, settings = parse(argv)
    out = args.out
    if uses_model(args):
        use_model(args)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with joined_processes(args.device), alone(out):
        by_first(lambda: check_start(out, args.resume, args.restart))
        check_compiler(settings, args.device)
        text = Text(args.data, tuple(args.glob or PYTHON)) if args.data else standard_library()
        model, texts, corpus = begin(args.model, text, settings, out / "corpus", args.seed)
        by_first(lambda: set_aside(out, RESULTS, args.resume))
        fixed = identify(model, args.model is not None, corpus, settings)
        run = make_run(out, model.to(args.device), fixed, settings, args.seed, args.save_minutes)
        run.resume()
        show_training(run, corpus, texts, settings)
        by_first(lambda: show_results(run, corpus, texts))
        seconds = time.perf_counter() - started
        by_first(lambda: print(f"\nSaved in {printable(out)} after {seconds:.1f} s", flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(record(main)())
