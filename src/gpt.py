#!/usr/bin/env python3
"""A language model like today's open ones learns Python, and is weighed as a compressor."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from attention import causal_mask
from inputs.documents import MARK, MARK_ID
from inputs.pretrained import (
    make_config,
    make_tokenizer_config,
    published_name,
    read_config,
)
from inputs.text import open_tokenizer
from running.shell import checksum, read_weights, refusing, write

LIMITS = {  # of the sizes in a file; the weights in it have to have them, too
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
    """The sizes of a network, and what the published ones of its kind differ in."""

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

    def __post_init__(self) -> None:
        """Raise ValueError if they make no network, as those in a file may."""
        for name, most in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {most:,}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} heads of keys can't serve {self.num_heads}")
        if self.d_k % 2:
            raise ValueError(f"d_k {self.d_k} is not even")
        if not (self.theta > 1 and 0 < self.epsilon < 1):
            raise ValueError(f"theta is {self.theta!r}, epsilon {self.epsilon!r}")


def frequencies(sizes: Sizes) -> Tensor:
    """Return how far each pair of numbers turns from one position to the next: (d_k / 2,)."""
    frequency = 1 / sizes.theta ** (torch.arange(0, sizes.d_k, 2) / sizes.d_k)
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
    """Queries, and fewer heads of keys and values (Ainslie et al. 2023), turned by their positions.

    The product of a turned query and a turned key depends on how far apart they are.
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
        nn.init.zeros_(self.W_o.weight)
        self.norm_q = nn.RMSNorm(sizes.d_k, sizes.epsilon) if sizes.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(sizes.d_k, sizes.epsilon) if sizes.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return what x (B, T, d_model) finds at its own and earlier positions, of the same shape.

        With a `Cache`, keys and values are of S tokens, the last T of them new; cos and sin of all.
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

    It begins without an opinion: sublayers add nothing, and all tokens are equally likely.
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

        Positions are (S,) or (B, S), by default from 0 on; the boolean mask, True where a token may
        attend, broadcasts to (B, T, S), and hides what is later besides. S is T, or with a `Cache`
        the number of all tokens so far.
        """
        T = tokens.shape[1]
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        S = positions.shape[-1]
        if mask is not None or 1 < T < S:
            causal = causal_mask(S, tokens.device)[S - T :]
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


def published_weights(model: GPT) -> dict[str, Tensor]:
    """Return the weights by their names in model.safetensors; a tied output has none there."""
    weights = model.state_dict()
    if model.sizes.tied:
        del weights["to_logits.weight"]
    return {published_name(name): tensor for name, tensor in weights.items()}


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Save a network and its tokenizer in a folder that `transformers` opens as a Llama."""
    weights = published_weights(model)
    about = {"format": "pt", "crc32": checksum(weights)}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", safetensors.torch.save(weights, about))
    write(folder / "config.json", make_config(asdict(model.sizes), MARK_ID))
    write(folder / "tokenizer.json", tokenizer.to_str().encode())
    write(folder / "tokenizer_config.json", make_tokenizer_config(MARK, model.sizes.context))


def open_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """Open a folder that this script or `transformers` has saved: the network, and its tokenizer.

    Raises OSError if a file is missing, broken, or of another kind of network.
    """
    message = "not a language model that this script can open"
    with refusing(folder / "config.json", message):
        sizes = Sizes(**read_config(folder / "config.json"))
        with torch.device("meta"):  # takes no memory, whatever the file says
            expected = published_weights(GPT(sizes))
    with refusing(folder / "model.safetensors", message):
        weights, _ = read_weights(folder / "model.safetensors", lambda _: expected)
    with refusing(folder / "tokenizer.json", message):
        tokenizer = open_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if tokenizer.get_vocab_size() > sizes.vocab_size:
            raise ValueError("it has more tokens than the network")
        if tokenizer.id_to_token(MARK_ID) != MARK:
            raise ValueError(f"its token {MARK_ID} is not {MARK}")
    model = GPT(sizes)
    for name, tensor in published_weights(model).items():
        tensor.copy_(weights[name])
    return model, tokenizer
