#!/usr/bin/env python3
"""Attention(Q, K, V) = softmax(QKᵀ/√d_k)V, step by step, with many heads, and then trained.

Run `poetry run src/attention.py`. It follows a sentence through the formula (Vaswani et al. 2017,
"Attention Is All You Need", arXiv 1706.03762), measures what each part is for, and trains a network
to reverse digits, all in about 15 s. Results go to runs/attention/. `--explain "a sentence"` only
follows that one.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from unicodedata import bidirectional, category, east_asian_width, normalize

import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

OUT = Path(__file__).resolve().parent.parent / "runs/attention"
SENTENCE, MAX_WORDS = "the cat sees the dog", 10  # as many as fit in 100 columns
MIN_DIGITS, MAX_DIGITS = 4, 10  # in a sequence
IGNORED = -100  # an answer that the loss leaves out
Attended = tuple[Tensor, Tensor | None]  # the output, and the weights if they were asked for


def check_shapes(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError that names the shapes, unless Q, K, V and the mask go together."""
    fewest = min(Q.dim(), K.dim(), V.dim())
    if fewest < 2 or Q.shape[-1] != K.shape[-1] or K.shape[-2] != V.shape[-2]:
        shapes = f"Q {tuple(Q.shape)}, K {tuple(K.shape)}, V {tuple(V.shape)}"
        raise ValueError(f"{shapes} are not (..., T, d_k), (..., S, d_k), (..., S, d_v)")
    T, S = Q.shape[-2], K.shape[-2]
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
    """Return sine and cosine of positions at d_model/2 frequencies, section 3.5: (T, d_model)."""
    frequency = 10_000 ** -(torch.arange(0, d_model, 2) / d_model)  # (d_model / 2,)
    angle = torch.arange(T).unsqueeze(1) * frequency  # (T, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model]


class MultiHeadAttention(nn.Module):
    """Concat(head_1, ..., head_h)W_o, section 3.2.2. Raises ValueError unless h divides d_model."""

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} can't be divided into {num_heads} heads")
        self.num_heads = num_heads  # h, and H in shapes; d_k = d_model / h
        self.dropout = dropout
        self.W_qkv = nn.Linear(d_model, 3 * d_model, bias=False)  # W_q, W_k, W_v of all heads
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Attended:  # fmt: skip
        """Attend from query (B, T, d_model) to key and value (B, S, d_model).

        The mask, True where a query may attend, broadcasts to (B, T, S) and holds for all heads.
        Returns the output (B, T, d_model) and, if they are asked for, the weights (B, H, T, S).
        """
        if query is key and key is value:
            Q, K, V = self.project(query, 0, 3)
        else:
            Q, K, V = (self.project(x, i, i + 1)[0] for i, x in enumerate((query, key, value)))
        return self.attend(Q, K, V, mask, need_weights)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Return [Q, K, V][first:last] of x (B, T, d_model): (n = last - first, B, H, T, d_k)."""
        W = self.W_qkv.weight
        if last - first < 3:  # for three no slice, whose gradient would have to be copied
            W = W[first * x.shape[-1] : last * x.shape[-1]]
        x = F.linear(x, W).unflatten(-1, (last - first, self.num_heads, -1))  # (B, T, n, H, d_k)
        return x.movedim((2, 3), (0, 2))

    def attend(
        self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Attended:  # fmt: skip
        """Do what `forward` does, from Q (B, H, T, d_k), K and V (B, H, S, d_k)."""
        if mask is not None and mask.dim() > 2:
            mask = mask.unsqueeze(-3)  # (B, T, S) -> (B, 1, T, S); the fused kernel wants 2 or 4
        check_shapes(Q, K, V, mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            output, weights = scaled_dot_product_attention(Q, K, V, mask, dropout)
        else:
            output, weights = F.scaled_dot_product_attention(Q, K, V, mask, dropout), None
        return self.W_o(output.transpose(1, 2).flatten(2)), weights


class EncoderLayer(nn.Module):
    """A layer of the encoder, section 3.1: attention, then a network for each position alone."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(d_model, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model)
        )
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)

    def forward(self, x: Tensor, mask: Tensor, need_weights: bool) -> Attended:
        """Return x (B, T, d_model) after the layer, and the weights (B, H, T, T) if asked for."""
        attended, weights = self.attention(x, x, x, mask, need_weights)
        x = self.norm1(x + attended)
        return self.norm2(x + self.feed_forward(x)), weights


class Reverser(nn.Module):
    """Reverses sequences of digits; how long each one is, only the padding mask tells."""

    def __init__(self, d_model: int = 64, num_heads: int = 2, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)  # as loud as the positions
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads) for _ in range(num_layers))
        self.register_buffer("positions", positional_encoding(MAX_DIGITS, d_model), False)
        self.to_logits = nn.Linear(d_model, 10)

    def forward(self, digits: Tensor, lengths: Tensor, need_weights: bool = False) -> Attended:
        """Return logits (B, T, 10) of digits (B, T), and the last layer's weights (B, H, T, T)."""
        T = digits.shape[1]
        x = self.embedding(digits) * math.sqrt(self.embedding.embedding_dim)  # section 3.4
        x, mask = x + self.positions[:T], padding_mask(lengths, T)
        for layer in self.layers:
            x, weights = layer(x, mask, need_weights)
        return self.to_logits(x), weights


def sample_sequences(lengths: Tensor, unseen: bool) -> tuple[Tensor, Tensor]:
    """Draw digits and answers (B, MAX_DIGITS): the first lengths[b] reversed, then IGNORED.

    Digits that add up to a multiple of ten are kept for the `unseen` sequences.
    """
    position, last = torch.arange(MAX_DIGITS), lengths.unsqueeze(1) - 1
    digits = torch.randint(10, (len(lengths), MAX_DIGITS))
    before = digits.masked_fill(position >= last, 0).sum(dim=1, keepdim=True)
    remainder = 0 if unseen else torch.randint(1, 10, last.shape)
    digits.scatter_(1, last, (remainder - before) % 10)
    answers = digits.gather(1, (last - position).clamp(min=0))
    return digits, answers.masked_fill(position > last, IGNORED)


def train(model: Reverser, steps: int, lr: float, batch_size: int = 128) -> list[float]:
    """Train and return the loss of each step. Raises FloatingPointError if one is not finite."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    losses = []
    model.train()
    for _ in tqdm(range(steps), unit="step", leave=False, disable=None):
        lengths = torch.randint(MIN_DIGITS, MAX_DIGITS + 1, (batch_size,))
        digits, answers = (x.to(device) for x in sample_sequences(lengths, unseen=False))
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
    every = range(MIN_DIGITS, MAX_DIGITS + 1)
    lengths = torch.tensor(every).repeat_interleave(count)
    digits, answers = (x.to(device) for x in sample_sequences(lengths, unseen=True))
    logits, _ = model.eval()(digits, lengths.to(device))
    exact = ((logits.argmax(dim=-1) == answers) | (answers == IGNORED)).all(dim=1)
    return dict(zip(every, exact.view(-1, count).cpu().double().mean(dim=1).tolist(), strict=True))


def label(name: str, width: int) -> str:
    """Set a name flush right in `width` cells of a terminal; cut it if it is too long for them."""
    name = "".join(c for c in name if category(c)[0] != "C")  # no controls, nothing invisible
    # Marks above and below take no cell, Chinese characters and emoji two.
    cells = [0 if category(c) in ("Mn", "Me") else 1 + (east_asian_width(c) in "WF") for c in name]
    if sum(cells) > width:
        kept = sum(end < width for end in accumulate(cells))
        name, cells = name[:kept] + "…", [*cells[:kept], 1]
    if any(bidirectional(c) in ("R", "AL") for c in name):
        name = f"\u2068{name}\u2069"  # so that it can't turn the order of its neighbors around
    return " " * (width - sum(cells)) + name


def shade(row: Sequence[float]) -> str:
    """Draw numbers from 0 to 1 to the nearest quarter, two cells each."""
    return "".join("·░▒▓█"[round(4 * number)] * 2 for number in row)


def print_pictures(titles: Sequence[str], pictures: Tensor, names: str) -> None:
    """Print pictures (N, T, T) side by side, with a character to name each row and column."""
    print("".join(f"{title:>{6 + 2 * len(names)}}" for title in titles))
    print(f"       {' '.join(names)}" * len(titles))
    for name, rows in zip(names, pictures.unbind(dim=1), strict=True):
        print("".join(f"   {name}  {shade(row)}" for row in rows.tolist()))


def show_walk(words: Sequence[str], d: int = 6, d_k: int = 4) -> Tensor:
    """Follow a sentence of T words through the formula, at random; return the weights (T, T)."""
    vocabulary = sorted(set(words))
    x = torch.randn(len(vocabulary), d)[[vocabulary.index(word) for word in words]]  # (T, d)
    W_q, W_k, W_v = torch.randn(3, d, d_k) / math.sqrt(d)
    Q, K, V = x @ W_q, x @ W_k, x @ W_v  # (T, d_k)
    scores = Q @ K.T  # (T, T)
    output, weights = scaled_dot_product_attention(Q, K, V)
    row = min(2, len(words))
    word = label(words[row - 1], 20).strip()
    features, parts = ([str(n) for n in range(1, size + 1)] for size in (d, d_k))
    for formula, matrix, rows, columns, reading in (
        ("x   (T, d)", x, words, features,
         "Row i is x⁽ⁱ⁾, the embedding of word i, here at random, but equal for equal words."),
        ("W_q   (d, d_k)", W_q, features, parts,
         "Turns embeddings into queries. Here at random; training would find it."),
        ("W_k   (d, d_k)", W_k, features, parts, "Turns embeddings into keys, likewise."),
        ("W_v   (d, d_k)", W_v, features, parts, "Turns embeddings into values, likewise."),
        ("Q = x W_q   (T, d_k)", Q, words, parts, "Row i is q_i = x⁽ⁱ⁾ W_q: what it looks for."),
        ("K = x W_k   (T, d_k)", K, words, parts, "Row i is k_i = x⁽ⁱ⁾ W_k: what it is found by."),
        ("V = x W_v   (T, d_k)", V, words, parts, "Row i is v_i = x⁽ⁱ⁾ W_v: what it has to say."),
        ("QKᵀ   (T, T)", scores, words, words,
         "Row i, column j is q_i · k_j: how well word j fits what word i looks for."),
        ("QKᵀ/√d_k   (T, T)", scores / math.sqrt(d_k), words, words,
         f"The same over √{d_k} = {math.sqrt(d_k):g}, so that its size does not grow with d_k."),
        ("softmax(QKᵀ/√d_k)   (T, T)", weights, words, words,
         f"Row {row} says where {word} looks; the row sums to 1. ░ is ¼, ▒ ½, ▓ ¾, █ 1."),
        ("softmax(QKᵀ/√d_k)V   (T, d_k)", output, words, parts,
         f"Row {row} is what {word} gets: a mixture of all v_j, by row {row} of the softmax."),
    ):  # fmt: skip
        print(f"\n{formula} = {tuple(matrix.shape)}\n{reading}")
        print(" " * 8 + "".join(" " + label(name, 6) for name in columns))
        for name, numbers in zip(rows, matrix.tolist(), strict=True):
            picture = "  " + shade(numbers) if matrix is weights else ""
            print(label(name, 8) + "".join(f"{number:7.2f}" for number in numbers) + picture)
    return weights


def show_scaling() -> None:
    """Print what √d_k does to scores of random queries and 16 keys, and to their softmax."""
    print("\nWhy √d_k: variance of the scores, entropy of the weights, gradient of the softmax")
    print(f"{'QKᵀ':>34}{'QKᵀ/√d_k':>29}\n     d_k" + "   variance  entropy  gradient" * 2)
    for d_k in (1, 4, 16, 64, 256, 1024):
        Q, K = torch.randn(2, 200, 16, d_k)
        print(f"{d_k:8}", end="")
        for scores in (Q @ K.mT, Q @ K.mT / math.sqrt(d_k)):
            a = scores.softmax(dim=-1)
            entropy = torch.special.entr(a).sum(dim=-1).mean()  # nats
            jacobian = a.diag_embed() - a.unsqueeze(-1) * a.unsqueeze(-2)  # of a row, by its scores
            size = torch.linalg.matrix_norm(jacobian).mean()
            print(f"{scores.var():11.2f}{entropy:9.2f}{size:10.3f}", end="")
        print()
    print("Unscaled, the variance is d_k: the larger, the more a single key takes all the weight,")
    print("and the flatter the softmax, which then hardly learns. Scaled, d_k makes no difference.")


def show_positions(T: int = 10, d_model: int = 64) -> None:
    """Print what the order of the words changes, without and with positional encoding."""
    heads, x = MultiHeadAttention(d_model, 4), torch.randn(1, T, d_model)
    order, positions = torch.randperm(T), positional_encoding(T, d_model)
    print("\nWhy positions: shuffle the words, and the output differs from the shuffled output by")
    for name, added in (("without", 0 * positions), ("with", positions)):
        straight, shuffled = (heads(y, y, y)[0] for y in (x + added, x[:, order] + added))
        difference = (shuffled - straight[:, order]).abs().max()
        print(f"{difference:12.7f} at most, {name} positional encoding")


def show_masks() -> None:
    """Print what masks look like, and what PyTorch's functions make of the same one."""
    causal, padding = causal_mask(5), padding_mask(torch.tensor(3), 5).expand(5, 5)
    print("\nMasks: █ where a query, a row, may attend to a key, a column\n")
    pictures = torch.stack((causal, padding, causal & padding)).float()
    print_pictures(["causal", "padding", "both"], pictures, "12345")

    mask = torch.tensor([[[True, True]], [[True, False]], [[False, True]], [[False, False]]])
    Q, K, V = torch.zeros(4, 1, 1), torch.zeros(4, 2, 1), torch.tensor([[[1.0], [2.0]]] * 4)
    theirs = nn.MultiheadAttention(1, 1, bias=False, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.ones_(parameter)
    print("\nWhat one query gets from two words that say 1 and 2, if the mask for them is")
    print(f"{'':34}True True  True False  False True  False False")
    for name, output in (
        ("scaled_dot_product_attention, here", scaled_dot_product_attention(Q, K, V, mask)[0]),
        ("F.scaled_dot_product_attention", F.scaled_dot_product_attention(Q, K, V, mask)),
        ("nn.MultiheadAttention", theirs(Q, K, V, attn_mask=mask)[0]),
        ("softmax(scores + mask.log()) @ V", (Q @ K.mT + mask.float().log()).softmax(dim=-1) @ V),
        ("softmax(scores + mask) @ V", (Q @ K.mT + mask.float()).softmax(dim=-1) @ V),
    ):
        print("{:34}{:9.2f}{:12.2f}{:12.2f}{:13.2f}".format(name, *output.flatten().tolist()))
    print("True forbids in nn.MultiheadAttention. A mask that is added must be 0 and -∞, for 1")
    print("and 0 hide nothing. Where all is forbidden, -∞ makes NaN, but zeros in the first two.")


def show_heads(T: int = 10, d_model: int = 64) -> None:
    """Print what any number of heads costs."""
    print("\nWhy many heads: each may look elsewhere, and all of them cost what one would")
    print("   heads     d_k   parameters   operations in matrix products")
    x = torch.randn(1, T, d_model)
    for num_heads in (1, 2, 4, 8):
        heads = MultiHeadAttention(d_model, num_heads)
        with FlopCounterMode(display=False) as flops:
            heads(x, x, x, need_weights=True)
        parameters = sum(p.numel() for p in heads.parameters())
        print(f"{num_heads:8}{d_model // num_heads:8}{parameters:13,}{flops.get_total_flops():32,}")


def draw_attention(weights: Tensor, names: Sequence[str]) -> Figure:
    """Draw weights (H, T, T), a panel a head, with the names of what attends on the axes."""
    figure = Figure(figsize=(4 * len(weights), 4), layout="constrained")
    for head, picture in enumerate(weights, start=1):
        axes = figure.add_subplot(1, len(weights), head)
        axes.imshow(picture.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set(title=f"head {head}", xlabel="looks at", ylabel="looks from")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
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
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Walk through the formula, train, show and save; return the exit status."""
    sys.stdout.reconfigure(encoding="utf-8")  # also into a pipe, or an old console
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser.add_argument("--explain", metavar="SENTENCE", help="only follow this one")
    parser.add_argument("--steps", type=int, default=500, help="batches to train on")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    args = parser.parse_args(argv)
    if not (args.steps >= 1 and 0 < args.lr < math.inf and 0 <= args.seed < 2**63):
        parser.error("--steps from 1, --lr above 0, --seed from 0, please")
    sentence = SENTENCE if args.explain is None else args.explain
    words = normalize("NFC", sentence).split()  # one é, however it was typed
    if not words:
        parser.error("argument --explain: there is no word in it")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError):
        parser.error(f"argument --device: {args.device!r} can't be used here")
    started = time.perf_counter()
    try:
        torch.manual_seed(args.seed)
        if len(words) > MAX_WORDS:
            print(f"The first {MAX_WORDS} of {len(words)} words; no more fit in 100 columns.")
        walk = show_walk(words[:MAX_WORDS])
        if args.explain is not None:
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            show_scaling()
            show_positions()
            show_masks()
            show_heads()

        model = Reverser().to(args.device)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"\n{parameters:,} parameters learn to reverse sequences of digits on {args.device}.")
        losses = train(model, args.steps, args.lr)
        exact = evaluate(model)
        print(f"The loss fell from {losses[0]:.4f} to {losses[-1]:.4f}. Of 1,000 new ones each:")
        print("digits      " + "".join(f"{length:8}" for length in exact))
        print("all correct " + "".join(f"{share:8.1%}" for share in exact.values()))

        length = torch.tensor([MAX_DIGITS])
        digits, _ = sample_sequences(length, unseen=True)
        with torch.inference_mode():
            logits, (weights,) = model(digits.to(args.device), length.to(args.device), True)
        text, guess = ("".join(map(str, x[0].tolist())) for x in (digits, logits.argmax(dim=-1)))
        print(f"\n{text} reversed is {guess}. Where each digit looks, in the last layer:")
        print_pictures([f"head {n + 1}" for n in range(len(weights))], weights, text)

        metrics = {
            "settings": vars(args), "torch": torch.__version__, "python": sys.version.split()[0],
            "loss": losses[-1], "exact": exact, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write(args.out / "model.safetensors", safetensors.torch.save(model.state_dict()))
        write(args.out / "attention.png", draw_attention(weights, text))
        write(args.out / "sentence.png", draw_attention(walk.unsqueeze(0), words))
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
