#!/usr/bin/env python3
"""Attention(Q, K, V) = softmax(QKᵀ/√d_k)V, step by step, then with many heads, then trained.

Run `poetry run src/attention.py`. It follows a sentence through the formula (Vaswani et al. 2017,
arXiv 1706.03762), shows what √d_k and masks do, and trains networks on a task that two heads can do
and one can't, in about 20 s. Results go to runs/attention/. `--explain "some words"` follows yours.
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category, normalize

import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

SENTENCE = "the cat sees the dog"
MAX_WORDS = 10  # as many as fit in 100 columns
JOINERS = "\u200c\u200d"  # which some scripts need within words
LENGTH = 10  # digits in a sequence
BATCH_SIZE = 128
LEARNING_RATE = 5e-3


def scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute softmax(QKᵀ/√d_k)V, equation 1 of the paper.

    Q (..., T, d_k), K (..., S, d_k), V (..., S, d_v) and a boolean mask (..., T, S), True where a
    query may attend to a key, give the output (..., T, d_v) and the weights (..., T, S). A query
    that may attend to nothing gets zeros. Raises ValueError if sizes differ or the mask isn't bool.
    """
    check_shapes(Q, K, V, mask)
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (..., T, S)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        # The lowest number instead of -inf: a row of -inf alone would make the softmax NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)
    return weights @ V, weights


def check_shapes(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> None:
    """Raise a ValueError that names what does not fit together."""
    shapes = f"Q {tuple(Q.shape)}, K {tuple(K.shape)}, V {tuple(V.shape)}"
    if Q.shape[-1] != K.shape[-1]:
        raise ValueError(f"queries and keys must have the same size: {shapes}")
    if K.shape[-2] != V.shape[-2]:
        raise ValueError(f"each key needs a value: {shapes}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a query may attend, got {mask.dtype}")


class SelfAttention(nn.Module):
    """One head: each word of a sentence attends to all its words."""

    def __init__(self, d: int, d_k: int) -> None:
        super().__init__()
        self.W_q = nn.Linear(d, d_k, bias=False)
        self.W_k = nn.Linear(d, d_k, bias=False)
        self.W_v = nn.Linear(d, d_k, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output (..., T, d_k) and the weights (..., T, T) for words x (..., T, d)."""
        return scaled_dot_product_attention(self.W_q(x), self.W_k(x), self.W_v(x))


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_h)W_o, section 3.2.2. Raises ValueError unless h divides d_model."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} must be divisible by num_heads {num_heads}")
        self.num_heads = num_heads  # h, and H in shapes; d_k = d_model / h
        self.W_q = nn.Linear(d_model, d_model, bias=False)  # the W_q of all heads side by side
        self.W_k = nn.Linear(d_model, d_model, bias=False)
        self.W_v = nn.Linear(d_model, d_model, bias=False)
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from query (B, T, d_model) to key and value (B, S, d_model): (B, T, d_model).

        The boolean mask, True where a query may attend, is (T, S) or (B, T, S) for all heads, or
        (B, H, T, S); dimensions of size 1 broadcast.
        """
        Q, K, V, mask = self.split_heads(query, key, value, mask)
        check_shapes(Q, K, V, mask)
        # PyTorch's fused kernel computes the formula without storing the T by S weights.
        output = F.scaled_dot_product_attention(Q, K, V, mask)  # (B, H, T, d_k)
        return self.W_o(output.transpose(1, 2).flatten(2))  # the heads side by side again

    def weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the weights (B, H, T, S) with which `forward` mixes the values."""
        return scaled_dot_product_attention(*self.split_heads(query, key, value, mask))[1]

    def split_heads(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return Q (B, H, T, d_k), K and V (B, H, S, d_k), and a mask that fits (B, H, T, S)."""
        projected = self.W_q(query), self.W_k(key), self.W_v(value)
        Q, K, V = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)  # (B, T, S) -> (B, 1, T, S)
        return Q, K, V, mask


def causal_mask(T: int, device: torch.device | None = None) -> Tensor:
    """Let position i attend to positions up to i, as in section 3.2.3: (T, T) bool."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def padding_mask(tokens: Tensor, pad: int) -> Tensor:
    """Let every position attend to all tokens but `pad`: tokens (B, S) -> (B, 1, S) bool."""
    return (tokens != pad).unsqueeze(1)


def positional_encoding(T: int, d_model: int) -> Tensor:
    """Return sine and cosine of positions at d_model/2 frequencies, section 3.5: (T, d_model)."""
    frequency = 10_000 ** -(torch.arange(0, d_model, 2) / d_model)  # (d_model / 2,)
    angle = torch.arange(T).unsqueeze(1) * frequency  # (T, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model]


class PairFinder(nn.Module):
    """Predicts two digits at each position: those of its mirror image and of its left neighbor.

    It has one layer of attention and nothing else that looks at other positions.
    """

    def __init__(self, num_heads: int, d_model: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, d_model)
        # Multiplied by √d_model (section 3.4), digits become about as large as positions.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        # A buffer moves with `.to(device)`; it isn't learned, and this one isn't saved.
        self.positions = nn.Buffer(positional_encoding(LENGTH, d_model), persistent=False)
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.norm = nn.LayerNorm(d_model)
        self.to_logits = nn.Linear(d_model, 2 * 10)

    def embed(self, digits: Tensor) -> Tensor:
        """Return embeddings with positions: digits (B, LENGTH) -> (B, LENGTH, d_model)."""
        return self.embedding(digits) * math.sqrt(self.embedding.embedding_dim) + self.positions

    @torch.inference_mode()
    def weights(self, digits: Tensor) -> Tensor:
        """Return the weights (B, H, LENGTH, LENGTH) with which the heads look at the digits."""
        x = self.embed(digits)
        return self.attention.weights(x, x, x)

    def forward(self, digits: Tensor) -> Tensor:
        """Return the logits (B, LENGTH, 2, 10) of mirror image and left neighbor."""
        x = self.embed(digits)
        x = self.norm(x + self.attention(x, x, x))
        return self.to_logits(x).unflatten(-1, (2, 10))


def sample_sequences(count: int, unseen: bool) -> tuple[Tensor, Tensor]:
    """Draw digits (count, LENGTH) and their labels (count, LENGTH, 2): mirror, left neighbor.

    The left neighbor of the first digit is the last. Digits that add up to a multiple of ten are
    reserved for the `unseen` sequences.
    """
    digits = torch.randint(10, (count, LENGTH))
    remainder = torch.zeros(count).long() if unseen else torch.randint(1, 10, (count,))
    digits[:, -1] = (remainder - digits[:, :-1].sum(dim=1)) % 10
    return digits, torch.stack((digits.flip(1), digits.roll(1, dims=1)), dim=-1)


def train(model: nn.Module, steps: int) -> list[float]:
    """Train and return the loss of each step. Raises FloatingPointError if one is not finite."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    losses = []
    for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
        digits, labels = (x.to(device) for x in sample_sequences(BATCH_SIZE, unseen=False))
        logits = model(digits)
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())  # a row for each label
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]}")
    return losses


@torch.inference_mode()
def share_exact(model: nn.Module, count: int = 1000) -> float:
    """Return the share of `count` unseen sequences with every digit predicted exactly."""
    device = next(model.parameters()).device
    digits, labels = (x.to(device) for x in sample_sequences(count, unseen=True))
    exact = (model.eval()(digits).argmax(dim=-1) == labels).flatten(1).all(dim=1)
    return exact.sum().item() / count


def draw_words(words: Sequence[str], d: int, d_k: int) -> tuple[Tensor, SelfAttention]:
    """Draw random embeddings (T, d), the same for the same word, and a random head."""
    vocabulary = sorted(set(words))
    x = torch.randn(len(vocabulary), d)[[vocabulary.index(word) for word in words]]
    head = SelfAttention(d, d_k).requires_grad_(False)
    for W in head.parameters():  # larger than nn.Linear makes them, so that words differ more
        nn.init.normal_(W, std=d**-0.5)
    return x, head


def label(name: str, width: int) -> str:
    """Right-align a name; cut it if it is too long."""
    return f"{name if len(name) <= width else name[: width - 1] + '…':>{width}}"


def shade(row: Sequence[float]) -> str:
    """Draw numbers from 0 to 1 to the nearest quarter, two characters each."""
    return "".join("·░▒▓█"[round(4 * number)] * 2 for number in row)


def show_pictures(titles: Sequence[str], pictures: Tensor, names: str) -> None:
    """Print pictures (N, T, T) side by side, with a character to name each row and column."""
    print("".join(f"{title:>{6 + 2 * len(names)}}" for title in titles))
    print(f"       {' '.join(names)}" * len(titles))
    for name, rows in zip(names, pictures.unbind(dim=1), strict=True):
        print("".join(f"   {name}  {shade(row)}" for row in rows.tolist()))


def show_matrix(
    formula: str, matrix: Tensor, rows: Sequence[str], columns: Sequence[str], reading: str,
    shaded: bool = False,
) -> None:  # fmt: skip
    """Print a matrix (len(rows), len(columns)), and how to read it; shade weights, too."""
    print(f"\n{formula} = {tuple(matrix.shape)}\n{reading}")
    print(" " * 8 + "".join(" " + label(name, 6) for name in columns))
    for name, numbers in zip(rows, matrix.tolist(), strict=True):
        picture = "  " + shade(numbers) if shaded else ""
        print(label(name, 8) + "".join(f"{number:7.2f}" for number in numbers) + picture)


def show_walk(words: Sequence[str], d: int = 6, d_k: int = 4) -> None:
    """Follow a sentence of T words, with random embeddings and weights, through the formula."""
    x, head = draw_words(words, d, d_k)
    W_q = head.W_q.weight.T  # (d, d_k)
    W_k = head.W_k.weight.T
    W_v = head.W_v.weight.T
    Q = x @ W_q  # (T, d_k)
    K = x @ W_k
    V = x @ W_v
    scores = Q @ K.T  # (T, T)
    scaled = scores / math.sqrt(d_k)
    output, weights = head(x)
    row = min(2, len(words))
    word = label(words[row - 1], 20).strip()
    features = [str(n) for n in range(1, d + 1)]
    parts = [str(n) for n in range(1, d_k + 1)]

    show_matrix("x   (T, d)", x, words, features, "Row i is x⁽ⁱ⁾, the embedding of word i.")
    show_matrix("W_q   (d, d_k)", W_q, features, parts, "Turns embeddings into queries.")
    show_matrix("W_k   (d, d_k)", W_k, features, parts, "Turns embeddings into keys.")
    show_matrix("W_v   (d, d_k)", W_v, features, parts, "Turns embeddings into values.")
    reading = "Row i is q_i = x⁽ⁱ⁾ W_q: what it looks for."
    show_matrix("Q = x W_q   (T, d_k)", Q, words, parts, reading)
    reading = "Row i is k_i = x⁽ⁱ⁾ W_k: what it is found by."
    show_matrix("K = x W_k   (T, d_k)", K, words, parts, reading)
    reading = "Row i is v_i = x⁽ⁱ⁾ W_v: what it passes on."
    show_matrix("V = x W_v   (T, d_k)", V, words, parts, reading)
    reading = "Row i, column j is q_i · k_j: how well they fit."
    show_matrix("QKᵀ   (T, T)", scores, words, words, reading)
    reading = f"The same divided by √{d_k} = {math.sqrt(d_k):g}, so that it does not grow with d_k."
    show_matrix("QKᵀ/√d_k   (T, T)", scaled, words, words, reading)
    reading = f"Row {row} says where {word} looks; the row sums to 1. ░ is ¼, ▒ ½, ▓ ¾, █ 1."
    show_matrix("softmax(QKᵀ/√d_k)   (T, T)", weights, words, words, reading, shaded=True)
    reading = f"Row {row} is what {word} gets: all v_j, averaged with row {row} of the softmax."
    show_matrix("softmax(QKᵀ/√d_k)V   (T, d_k)", output, words, parts, reading)


def show_scaling() -> None:
    """Print what √d_k does to the scores of random queries and 16 keys, and to their softmax."""
    print("\nWhy √d_k: the scores, the largest of 16 weights, and the gradient of the softmax")
    print(f"{'QKᵀ':>35}{'QKᵀ/√d_k':>32}\n     d_k" + "   variance   largest  gradient" * 2)
    for d_k in (16, 64, 256, 1024):
        Q, K = torch.randn(2, 200, 16, d_k)
        print(f"{d_k:8}", end="")
        for scores in (Q @ K.mT, Q @ K.mT / math.sqrt(d_k)):
            a = scores.softmax(dim=-1)
            # The derivative of weight i by score j is a_i (1 - a_j) if i = j, else -a_i a_j.
            jacobian = a.diag_embed() - a.unsqueeze(-1) * a.unsqueeze(-2)
            gradient = torch.linalg.matrix_norm(jacobian).mean()
            largest = a.amax(dim=-1).mean()
            print(f"{scores.var():11.2f}{largest:10.2f}{gradient:10.3f}", end="")
        print()
    print("Unscaled, the variance is d_k: with a large d_k one key takes nearly all the weight,")
    print("the gradient all but vanishes, and learning stalls. Scaled, d_k makes no difference.")


def compare(steps: int, device: str) -> tuple[dict[str, tuple[float, float]], PairFinder]:
    """Train three networks; return the last loss and exact share of each, and the last network."""
    results = {}
    for name, num_heads, positions in (
        ("two heads, no positions", 2, False),
        ("one head", 1, True),
        ("two heads", 2, True),
    ):
        model = PairFinder(num_heads).to(device)
        if not positions:
            model.positions.zero_()
        loss = train(model, steps)[-1]
        results[name] = (loss, share_exact(model))
    return results, model


def show_heads(results: dict[str, tuple[float, float]], names: str, weights: Tensor) -> None:
    """Print results and where heads look: weights (B, H, T, T); names are the first sequence."""
    print("\nWhy positions and many heads: predict the digits of mirror image and left neighbor")
    print(f"{'':25}last loss  all right, of 1,000 unseen sequences")
    for name, (loss, exact) in results.items():
        print(f"{name:25}{loss:9.4f}{exact:11.1%}")
    places = torch.arange(LENGTH)
    for head, picture in enumerate(weights.mean(dim=0), start=1):
        mirror = picture[places, places.flip(0)].mean()
        left = picture[places, places - 1].mean()
        where = f"{mirror:.0%} of its weight on the mirror image, {left:.0%} on the left neighbor"
        print(f"Head {head} puts {where}.")
    show_pictures([f"head {n + 1}" for n in range(len(weights[0]))], weights[0], names)


def show_masks() -> None:
    """Print what masks look like."""
    print("\nMasks: █ where a query (row) may attend to a key (column)\n")
    causal = causal_mask(5)
    padding = padding_mask(torch.tensor([[7, 7, 7, 0, 0]]), pad=0)[0]
    pictures = torch.stack((causal, padding.expand(5, 5), causal & padding)).float()
    show_pictures(["causal", "padding", "both"], pictures, "12345")


def draw_heads(weights: Tensor, rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """Draw weights (H, T, S), a panel per head, with the names of queries and keys: a PNG."""
    across = min(2, len(weights))
    down = math.ceil(len(weights) / 2)
    size = (4 * across, down * (1.3 + 3 * min(4, len(rows) / len(columns))))
    figure = Figure(figsize=size, layout="constrained")
    for head, picture in enumerate(weights.tolist(), start=1):
        axes = figure.add_subplot(down, across, head, title=f"head {head}", xlabel="looks at")
        axes.imshow(picture, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, bbox_inches="tight")
    return png.getvalue()


def split_words(sentence: str) -> list[str]:
    """Parse --explain: 1 to MAX_WORDS words, without what could steer the terminal."""
    words = normalize("NFC", sentence).split()  # one é, however it was typed
    if not 1 <= len(words) <= MAX_WORDS:
        raise argparse.ArgumentTypeError(f"must have 1 to {MAX_WORDS} words; more don't fit")

    def steers(character: str) -> bool:
        return category(character) in ("Cc", "Cf", "Cs") and character not in JOINERS

    return ["".join("?" if steers(c) else c for c in word) for word in words]


def usable_device(name: str) -> str:
    """Parse --device; argparse refuses the option unless a tensor can be made there."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each kind of device fails in its own way
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{name!r} can't be used here: {reason}") from None
    return name


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add = parser.add_argument
    add("--explain", type=split_words, metavar="SENTENCE", help="follow this sentence and exit")
    add("--steps", type=int, default=500, help="batches to train each network on")
    add("--seed", type=int, default=0, help="fixes every random choice")
    add("--device", type=usable_device, default=device, help="where to compute")
    add("--out", type=Path, default="runs/attention", help="folder for the results")
    return parser


def save(model: nn.Module, picture: bytes, metrics: object, out: Path) -> None:
    """Save a network, the picture of its heads, and the metrics."""
    (out / "model.safetensors").write_bytes(safetensors.torch.save(model.state_dict()))
    (out / "attention.png").write_bytes(picture)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, default=str))


def main(argv: Sequence[str] | None = None) -> int:
    """Walk through the formula, train, save and show; return the exit status."""
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 100_000:
        parser.error("argument --steps: must be between 1 and 100,000")
    if not 0 <= args.seed < 2**63:
        parser.error("argument --seed: must be between 0 and 2**63 - 1")
    if not str(args.out).isprintable():  # it is printed below
        parser.error("argument --out: must be a name that can be printed")
    torch.manual_seed(args.seed)
    try:
        show_walk(args.explain or SENTENCE.split())
        if args.explain:
            return 0
        show_scaling()
        show_masks()
        print(end="", flush=True)  # one can read while it trains
        args.out.mkdir(parents=True, exist_ok=True)
        results, model = compare(args.steps, args.device)
        digits, _ = sample_sequences(1000, unseen=True)
        weights = model.weights(digits.to(args.device)).cpu()
        names = "".join(map(str, digits[0].tolist()))
        metrics = {"settings": vars(args), "torch": torch.__version__, "results": results}
        save(model, draw_heads(weights[0], names, names), metrics, args.out)
        show_heads(results, names, weights)
        print(f"\nSaved in {args.out} after {time.perf_counter() - started:.1f} s", flush=True)
    except (OSError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on, Ctrl-C leaves no traceback
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so does `| head`
    if sys.stderr is None:  # closed, but progress bars need one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # not if it is closed
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    raise SystemExit(main())
