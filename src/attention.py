#!/usr/bin/env python3
"""Attention(Q, K, V) = softmax(QKᵀ/√d_k)V, step by step, with many heads, and then trained.

Run `poetry run src/attention.py`. It follows a sentence through the formula (Vaswani et al. 2017,
"Attention Is All You Need", arXiv 1706.03762), then trains a small network made of these parts to
reverse sequences of digits, and shows what it looks at. Saves it under runs/attention/.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MIN_DIGITS, MAX_DIGITS = 4, 10  # in a sequence
IGNORED = -100  # an answer that the loss leaves out


def check_shapes(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError that names the shapes, unless Q, K, V and the mask go together."""
    T, S = Q.shape[-2], K.shape[-2]
    shapes = f"Q {tuple(Q.shape)}, K {tuple(K.shape)}, V {tuple(V.shape)}"
    if Q.shape[-1] != K.shape[-1] or V.shape[-2] != S:
        raise ValueError(f"{shapes} are not (..., T, d_k), (..., S, d_k), (..., S, d_v)")
    broadcast = ((T, S), (1, S), (T, 1), (1, 1))
    if mask is not None and (mask.dtype != torch.bool or mask.shape[-2:] not in broadcast):
        raise ValueError(f"a mask of {mask.dtype} {tuple(mask.shape)} is not (..., {T}, {S}) bool")


def scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute softmax(QKᵀ/√d_k)V, equation 1 of the paper.

    Q (..., T, d_k), K (..., S, d_k), V (..., S, d_v) and a mask (..., T, S) of booleans, True where
    a query may attend to a key, give the output (..., T, d_v) and the weights (..., T, S). A query
    that may attend to nothing gets zeros. Raises ValueError for other shapes or another mask.
    """
    check_shapes(Q, K, V, mask)
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (..., T, S)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        # The lowest number and not -inf, whose softmax is NaN where a whole row is masked.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
    return F.dropout(weights, dropout) @ V, weights


def causal_mask(T: int, device: torch.device | None = None) -> Tensor:
    """Let position i attend to positions up to i, as in section 3.2.3: (T, T) bool."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def padding_mask(lengths: Tensor, T: int) -> Tensor:
    """Let all positions attend to the first lengths[b] only: lengths (B,) -> (B, 1, T) bool."""
    return (torch.arange(T, device=lengths.device) < lengths.unsqueeze(-1)).unsqueeze(-2)


def positional_encoding(T: int, d_model: int) -> Tensor:
    """Give sine and cosine of each position at d_model/2 frequencies, section 3.5: (T, d_model)."""
    frequency = 10_000 ** -(torch.arange(0, d_model, 2) / d_model)  # (d_model / 2,)
    angle = torch.arange(T).unsqueeze(1) * frequency  # (T, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model]


class SelfAttention(nn.Module):
    """One head: every word asks (W_q), offers (W_k) and says (W_v) something."""

    def __init__(self, d: int, d_k: int) -> None:
        super().__init__()
        self.W_q = nn.Linear(d, d_k, bias=False)
        self.W_k = nn.Linear(d, d_k, bias=False)
        self.W_v = nn.Linear(d, d_k, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the output (..., T, d_k) and the weights (..., T, T) of x (..., T, d)."""
        return scaled_dot_product_attention(self.W_q(x), self.W_k(x), self.W_v(x), mask)


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_h)W_o, section 3.2.2, with d_k = d_model / num_heads.

    Raises ValueError if d_model can't be divided so.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} can't be divided into {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.W_qkv = nn.Linear(d_model, 3 * d_model, bias=False)  # W_q, W_k, W_v of all heads
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query (B, T, d_model) to key and value (B, S, d_model).

        The mask, True where a query may attend, broadcasts to (B, T, S) and holds for all heads.
        Returns the output (B, T, d_model) and, if they are asked for, the weights (B, H, T, S).
        """
        if query is key and key is value:
            Q, K, V = self.project(query, 0, 3)
        else:
            (Q,), (K,), (V,) = (
                self.project(x, i, i + 1) for i, x in enumerate((query, key, value))
            )
        return self.attend(Q, K, V, mask, need_weights)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Multiply x (B, T, d_model) by W_q, W_k and W_v, or those from `first` up to `last`.

        Returns Q, K and V of all heads, or those of them, in one tensor (3, B, H, T, d_k).
        """
        W = self.W_qkv.weight[first * x.shape[-1] : last * x.shape[-1]]
        return (
            F.linear(x, W).unflatten(-1, (last - first, self.num_heads, -1)).movedim((2, 3), (0, 2))
        )

    def attend(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what `forward` does, from Q (B, H, T, d_k), K and V (B, H, S, d_k)."""
        if mask is not None:
            mask = mask.unsqueeze(-3)  # (B, T, S) -> (B, 1, T, S)
        check_shapes(Q, K, V, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            output, weights = scaled_dot_product_attention(Q, K, V, mask, dropout)
        else:
            output, weights = F.scaled_dot_product_attention(Q, K, V, mask, dropout), None
        return self.W_o(output.transpose(1, 2).flatten(2)), weights


class Layer(nn.Module):
    """A layer of the encoder, section 3.1: attention, then a network for each position alone."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.grow, self.shrink = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, mask: Tensor, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Give x (B, T, d_model) after the layer, and the weights (B, H, T, T) if asked for."""
        attended, weights = self.attention(x, x, x, mask, need_weights)
        x = self.norm1(x + attended)
        return self.norm2(x + self.shrink(self.grow(x).relu())), weights


class Reverser(nn.Module):
    """Reverses sequences of digits; how long each one is, only the padding mask tells."""

    def __init__(self, d_model: int = 64, num_heads: int = 2, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # as large as the positions, then
        layers = [Layer(d_model, num_heads, d_ff=4 * d_model) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        self.to_logits = nn.Linear(d_model, 10)

    def forward(
        self, digits: Tensor, lengths: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Give the logits (B, T, 10) of digits (B, T) and the weights (B, H, T, T) of the end."""
        T, d_model = digits.shape[1], self.embedding.embedding_dim
        x = self.embedding(digits) * math.sqrt(d_model)  # section 3.4
        x = x + positional_encoding(T, d_model).to(x)
        mask = padding_mask(lengths, T)
        for layer in self.layers:
            x, weights = layer(x, mask, need_weights)
        return self.to_logits(x), weights


def draw_sequences(lengths: Tensor, unseen: bool) -> tuple[Tensor, Tensor]:
    """Draw random digits, and reverse the first lengths[b] of them: lengths (B,) up to MAX_DIGITS.

    Returns digits (B, MAX_DIGITS) and answers (B, MAX_DIGITS), which are IGNORED after the end.
    Digits that add up to a multiple of ten are kept for the `unseen` sequences.
    """
    position = torch.arange(MAX_DIGITS)
    last = lengths.unsqueeze(1) - 1
    digits = torch.randint(10, (len(lengths), MAX_DIGITS))
    before = digits.masked_fill(position >= last, 0).sum(dim=1, keepdim=True)
    remainder = 0 if unseen else torch.randint(1, 10, last.shape)
    digits.scatter_(1, last, (remainder - before) % 10)
    answers = digits.gather(1, (last - position).clamp(min=0))
    return digits, answers.masked_fill(position > last, IGNORED)


def train(model: Reverser, steps: int, batch_size: int, lr: float) -> list[float]:
    """Train on new sequences in every step; return the loss of each.

    Raises FloatingPointError when the loss is no longer a finite number.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    losses = []
    model.train()
    for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
        lengths = torch.randint(MIN_DIGITS, MAX_DIGITS + 1, (batch_size,))
        digits, answers = (x.to(device) for x in draw_sequences(lengths, unseen=False))
        logits, _ = model(digits, lengths.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]}; a smaller --lr may help")
    return losses


@torch.inference_mode()
def evaluate(model: Reverser, count: int = 1000) -> dict[int, float]:
    """Return, for each length, the share of `count` unseen sequences that come out exactly."""
    device = next(model.parameters()).device
    every = torch.arange(MIN_DIGITS, MAX_DIGITS + 1)
    lengths = every.repeat_interleave(count)
    digits, answers = (x.to(device) for x in draw_sequences(lengths, unseen=True))
    logits, _ = model.eval()(digits, lengths.to(device))
    exact = ((logits.argmax(dim=-1) == answers) | (answers == IGNORED)).all(dim=1)
    return dict(
        zip(every.tolist(), exact.view(-1, count).double().mean(dim=1).tolist(), strict=True)
    )


def print_matrix(title: str, matrix: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Print a matrix under its formula, with its shape and the names of its rows and columns."""
    print(f"\n{title} = {tuple(matrix.shape)}\n{'':8}" + "".join(f"{name:>8}" for name in columns))
    for name, row in zip(rows, matrix.tolist(), strict=True):
        print(f"{name:>8}" + "".join(f"{number:8.2f}" for number in row))


@torch.no_grad()
def show_sentence(words: Sequence[str], d: int = 6, d_k: int = 4) -> None:
    """Follow a sentence through the formula, with embeddings and weights drawn at random."""
    vocabulary = sorted(set(words))
    x = torch.randn(len(vocabulary), d)[[vocabulary.index(word) for word in words]]  # (T, d)
    head = SelfAttention(d, d_k)
    Q, K, V = head.W_q(x), head.W_k(x), head.W_v(x)  # (T, d_k)
    output, weights = head(x)
    numbers = [str(i + 1) for i in range(d)]
    print_matrix("x, a random embedding for each word   (T, d)", x, words, numbers)
    print_matrix("Q = x W_q   (T, d_k)", Q, words, numbers[:d_k])
    print_matrix("K = x W_k   (T, d_k)", K, words, numbers[:d_k])
    print_matrix("V = x W_v   (T, d_k)", V, words, numbers[:d_k])
    print_matrix("QKᵀ   (T, T)", Q @ K.T, words, words)
    print_matrix("QKᵀ/√d_k   (T, T)", Q @ K.T / math.sqrt(d_k), words, words)
    print_matrix("softmax(QKᵀ/√d_k), rows add up to 1   (T, T)", weights, words, words)
    print_matrix("softmax(QKᵀ/√d_k)V   (T, d_k)", output, words, numbers[:d_k])


def show_attention(weights: Tensor, digits: str) -> None:
    """Print where each position looks, weights (H, T, T), as one picture of characters a head."""
    for head, rows in enumerate(weights.tolist(), start=1):
        print(f"\n  head {head}  {' '.join(digits)}")
        for digit, row in zip(digits, rows, strict=True):
            print(f"       {digit}  " + "".join(" ░▒▓█"[min(4, int(5 * w))] * 2 for w in row))


def draw_attention(weights: Tensor, digits: str) -> Figure:
    """Draw the same, with one panel a head and the digits on the axes."""
    figure = Figure(figsize=(4 * len(weights), 4), layout="constrained")
    panels = figure.subplots(1, len(weights), squeeze=False)[0]
    for head, (axes, picture) in enumerate(zip(panels, weights, strict=True), start=1):
        axes.imshow(picture.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=f"head {head}", xlabel="looks at", ylabel="position")
        axes.set_xticks(range(len(digits)), digits)
        axes.set_yticks(range(len(digits)), digits)
    return figure


def write(path: Path, content: bytes | Figure) -> None:
    """Write beside and move into place: a crash leaves the old file or the new one, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        if isinstance(content, Figure):
            content.savefig(beside, format="png", dpi=120)
        else:
            beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} can't be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Walk through the formula, train, show and save; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    out = ROOT / "runs/attention"
    parser.add_argument("--steps", type=int, default=500, help="batches to train on")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences a batch")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--out", type=Path, default=out, help="folder for the results")
    args = parser.parse_args(argv)
    numbers_fit = args.steps >= 1 and args.batch_size >= 1 and 0 < args.lr < math.inf
    if not numbers_fit or not 0 <= args.seed < 2**63:
        parser.error("--steps and --batch-size from 1, --lr above 0, --seed from 0, please")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device!r} can't be used here")
    started = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        show_sentence(["the", "cat", "sees", "the", "dog"])

        model = Reverser().to(args.device)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"\n{parameters:,} parameters learn to reverse sequences of digits on {args.device}.")
        losses = train(model, args.steps, args.batch_size, args.lr)
        exact = evaluate(model)
        print(f"The loss fell from {losses[0]:.4f} to {losses[-1]:.4f}. Of 1,000 new ones each:")
        print("digits      " + "".join(f"{length:8}" for length in exact))
        print("all correct " + "".join(f"{share:8.1%}" for share in exact.values()))

        length = torch.tensor([MAX_DIGITS])
        digits, _ = draw_sequences(length, unseen=True)
        with torch.inference_mode():
            logits, weights = model(digits.to(args.device), length.to(args.device), True)
        weights = weights[0].cpu()  # (H, T, T)
        text, guess = ("".join(map(str, x[0].tolist())) for x in (digits, logits.argmax(dim=-1)))
        print(f"\n{text} reversed is {guess}. Where each digit looks, in the last layer:")
        show_attention(weights, text)

        metrics = {
            "settings": vars(args), "torch": torch.__version__, "python": sys.version.split()[0],
            "loss": losses[-1], "exact": exact, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write(args.out / "model.safetensors", safetensors.torch.save(model.state_dict()))
        write(args.out / "attention.png", draw_attention(weights, text))
        write(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())
        print(f"\nSaved in {args.out} after {metrics['seconds']:.1f} s")
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
