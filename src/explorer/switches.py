"""Attention and the networks with a part switched off, and what goes on inside them.

explore.py shows it on a page. The right code is in attention.py, transformer.py, gpt.py, search.py
and sampling.py; this file only adds deliberate mistakes, and ways to look inside.
"""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attention import (
    MultiHeadAttention,
    PairFinder,
    SelfAttention,
    causal_mask,
    draw_words,
    padding_mask,
    positional_encoding,
    sample_sequences,
    scaled_dot_product_attention,
)
from decoding.sampling import Sampling, keep_top_k, keep_top_p, next_tokens
from decoding.search import plain_decoder, search
from gpt import GPT
from inputs.dates import share_exact
from inputs.pretrained import Texts
from inputs.text import BOS, EOS, PAD, Pair
from transformer import Transformer, encode

RIGHT_MASKS = ("none", "causal", "padding: the last word")
WRONG_MASKS = ("causal, True and False swapped", "causal, added as 1 and 0")
PARTS = ("positions", "causal mask", "padding mask", "times √d_model")
GPT_PARTS = PARTS[:2]


class Formula(NamedTuple):
    """The steps of attention, from T queries to T keys."""

    scores: Tensor  # QKᵀ (T, T)
    scaled: Tensor  # input of the softmax (T, T)
    weights: Tensor  # (T, T)
    output: Tensor  # (T, d_v)


def draw_sentence(words: Sequence[str], d_k: int, d: int = 6) -> tuple[Tensor, SelfAttention]:
    """Draw the embeddings (T, d) and the head that `attention.py --explain` shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return draw_words(words, d, d_k)


def attend(
    Q: Tensor, K: Tensor, V: Tensor, scaled: bool = True, mask: str = "none", by_row: bool = True
) -> Formula:
    """Follow Q, K (T, d_k) and V (T, d_v) through the formula, or through a wrong one.

    The wrong ones leave out √d_k, normalize each column instead of each row, or use one of
    WRONG_MASKS.
    """
    T, d_k = Q.shape
    scores = Q @ K.T
    causal = causal_mask(T)
    padding = padding_mask(torch.tensor([[*range(1, T), PAD]]), PAD)[0].expand(T, T)
    allowed = dict(zip(RIGHT_MASKS, (None, causal, padding), strict=True)).get(mask)
    logits = scores / math.sqrt(d_k) if scaled else scores
    if mask == WRONG_MASKS[0]:
        logits = logits.masked_fill(causal, -math.inf)
    elif mask == WRONG_MASKS[1]:
        logits = logits + causal.to(logits)
    elif allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if scaled and by_row and mask in RIGHT_MASKS:
        output, weights = scaled_dot_product_attention(Q, K, V, allowed)
    else:
        weights = logits.softmax(dim=1 if by_row else 0)
        output = weights @ V
    return Formula(scores, logits, weights, output)


def name_faults(weights: Tensor, mask: str) -> list[str]:
    """Name the faults of weights (T, T): rows that don't add up to 1, a visible future, NaN."""
    faults = []
    sums = weights.sum(dim=1)
    broken = [str(i + 1) for i in sums.isnan().nonzero().flatten().tolist()]
    if broken:
        faults.append(f"NaN in row {', '.join(broken)}: all words are hidden, and 0/0 is NaN.")
    off = [str(i + 1) for i in ((sums - 1).abs() > 1e-3).nonzero().flatten().tolist()]
    if off:
        faults.append(f"The weights of row {', '.join(off)} don't add up to 1.")
    future = weights.triu(diagonal=1).nan_to_num().sum(dim=1)
    if "causal" in mask and future.max() > 1e-6:
        row = int(future.argmax())
        faults.append(f"The future leaks: row {row + 1} gives {future[row]:.0%} to later words.")
    return faults


def remove_head(W_o: nn.Module, num_heads: int, head: int) -> None:
    """Give W_o zeros in place of one head's output, from now on."""

    def blank(W_o: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        split = inputs[0].unflatten(-1, (num_heads, -1)).clone()  # (B, T, H, d_k)
        split[:, :, head] = 0
        return split.flatten(2)

    W_o.register_forward_pre_hook(blank)


def shuffle(words: Sequence[str], seed: int, positions: bool) -> tuple[list[int], Tensor, Tensor]:
    """Shuffle T words; return their order, and a head's outputs (T, 4) before and after.

    The second output is brought back into the first order, so that the two can be compared.
    """
    order = Random(seed).sample(range(len(words)), len(words))
    x, head = draw_sentence(words, 4)
    places = positional_encoding(*x.shape) if positions else torch.zeros_like(x)
    before, _ = head(x + places)
    after, _ = head(x[order] + places)
    return order, before, after[torch.tensor(order).argsort()]


@torch.inference_mode()
def score_pairs(model: PairFinder, without: int | None) -> tuple[Tensor, str, Tensor]:
    """Test a PairFinder without one head, or with all heads if `without` is None.

    Returns the weights (H, T, T) for a sequence, the sequence, and the shares (3,) of 1,000 unseen
    sequences predicted exactly, and of their mirror images and left neighbors predicted right.
    """
    model = copy.deepcopy(model).eval()
    if without is not None:
        remove_head(model.attention.W_o, model.attention.num_heads, without)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        digits, labels = sample_sequences(1000, unseen=True)
    right = (model(digits).argmax(dim=-1) == labels).float()
    shares = torch.stack((right.amin(dim=(1, 2)).mean(), *right.mean(dim=(0, 1))))
    return model.weights(digits[:1])[0], "".join(map(str, digits[0].tolist())), shares


def name_heads(model: Transformer) -> dict[str, tuple[str, int]]:
    """Return a readable name for each head, with the name of its attention and its number there."""
    names = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadAttention):
            side, layer, kind = name.split(".")
            for head in range(module.num_heads):
                where = f"{side} layer {int(layer) + 1}, {kind.replace('_', ' ')}, head {head + 1}"
                names[where] = name, head
    return names


def switch_off(
    model: Transformer, off: Collection[str], head: tuple[str, int] | None = None
) -> Transformer:
    """Return a copy without some of PARTS, and without a head: its attention's name and number."""
    model = copy.deepcopy(model).eval()

    def unmask(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mask, memory, memory_mask = inputs
        mask = torch.ones_like(mask) if "causal mask" in off else mask
        memory_mask = torch.ones_like(memory_mask) if "padding mask" in off else memory_mask
        return x, mask, memory, memory_mask

    for layer in model.decoder:
        layer.register_forward_pre_hook(unmask)
    if "positions" in off:
        model.positions.zero_()
    if "times √d_model" in off:
        model.embedding.register_forward_hook(lambda _, __, x: x / math.sqrt(x.shape[-1]))
    if head:
        heads = cast(MultiHeadAttention, model.get_submodule(head[0]))
        remove_head(heads.W_o, heads.num_heads, head[1])
    return model


@torch.inference_mode()
def write_slowly(model: Transformer, source: Tensor, limit: int = 12) -> tuple[Tensor, Tensor]:
    """Generate like transformer.generate, but without a cache, so that the masks matter.

    Return the tokens (B, limit), and the probabilities (B, limit, V) from which each was chosen.
    """
    memory = model.eval().encode(source)
    memory_mask = padding_mask(source, PAD)
    target = torch.full((len(source), 1), BOS, device=source.device)
    probabilities = []
    for _ in range(limit):
        probabilities.append(model.decode(target, memory, memory_mask)[:, -1].softmax(dim=-1))
        target = torch.cat((target, probabilities[-1].argmax(dim=-1, keepdim=True)), dim=1)
    return target[:, 1:], torch.stack(probabilities, dim=1)


def letter(token: int, vocabulary: dict[str, int]) -> str:
    """Return the character of a token, or what it stands for."""
    characters = {i: c for c, i in vocabulary.items()} | {PAD: "pad", BOS: "start", EOS: "end"}
    return characters.get(token, "?")


def spell(tokens: Sequence[int], vocabulary: dict[str, int]) -> str:
    """Return the characters of tokens up to EOS."""
    ids = [*tokens, EOS]
    characters = {i: c for c, i in vocabulary.items()}
    return "".join(characters.get(i, "?") for i in ids[: ids.index(EOS)])


def score_dates(model: Transformer, vocabulary: dict[str, int], pairs: Sequence[Pair]) -> float:
    """Return the share of dates that are predicted exactly."""
    sources = [encode(text, vocabulary) for text, _ in pairs]
    source = pad_sequence(sources, batch_first=True, padding_value=PAD)
    tokens, _ = write_slowly(model, source)
    return share_exact(pairs, [spell(row, vocabulary) for row in tokens.tolist()])


class Branch(NamedTuple):
    """An unfinished target of a beam search."""

    tokens: tuple[int, ...]  # after BOS
    log_p: float
    ended: float  # log P if EOS came next
    score: float  # that, by equation 14 of Wu et al. 2016


@torch.inference_mode()
def watch_beam(
    model: Transformer, source: Tensor, beam: int, alpha: float
) -> tuple[list[int], list[list[Branch]]]:
    """Search for the target of a source (1, S); return it, and the branches at each step."""
    steps: list[list[Branch]] = []
    plain = plain_decoder(model.eval(), source, beam)
    sums = torch.zeros(beam)  # log P of each target
    log_p = torch.empty(0)

    def decode(target: Tensor, rows: Tensor) -> Tensor:
        nonlocal sums, log_p
        if steps:
            sums = sums[rows] + log_p[rows, target[:, -1]]
        logits = plain(target, rows)
        log_p = logits.log_softmax(dim=-1)  # (beam, V)
        ended = sums + log_p[:, EOS]
        scores = ended / ((5 + target.shape[1]) / 6) ** alpha
        numbers = zip(sums.tolist(), ended.tolist(), scores.tolist(), strict=True)
        branches = {
            tuple(tokens): Branch(tuple(tokens), *three)
            for tokens, three in zip(target[:, 1:].tolist(), numbers, strict=True)
        }
        steps.append([*branches.values()])  # the first rows are all alike
        return logits

    (found,) = search(decode, source, beam, alpha)
    return found, steps


def change_gpt(
    model: GPT,
    off: Collection[str] = (),
    theta: float | None = None,
    head: tuple[int, int] | None = None,
) -> GPT:
    """Return a copy without some of GPT_PARTS, and without a head: its layer and number there.

    `theta` replaces the base of the frequencies. The copy shares the weights of the network.
    """
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    if theta is not None:
        model.sizes = replace(model.sizes, theta=theta)

    def change(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, cos, sin, mask = inputs
        if "causal mask" in off:
            mask = torch.ones(x.shape[1], cos.shape[-2], dtype=torch.bool, device=x.device)
        if "positions" in off:  # angles of 0
            cos = torch.ones_like(cos)
            sin = torch.zeros_like(sin)
        return x, cos, sin, mask

    for layer in model.layers:
        layer.register_forward_pre_hook(change)
    if head:
        W_o = model.get_submodule(f"layers.{head[0]}.attention.W_o")
        remove_head(W_o, model.sizes.num_heads, head[1])
    return model


@torch.inference_mode()
def predict_each(model: GPT, tokens: Sequence[int]) -> Tensor:
    """Return the bits (T, V) that each token would cost after each of T tokens: -log2 p."""
    logits = model.eval()(torch.tensor([tokens]))[0]
    return -logits.log_softmax(dim=-1) / math.log(2)


def count_bits(predicted: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the bits (T - 1,) that each of T tokens but the first costs, from `predict_each`."""
    return predicted[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


def find_rivals(bits: Tensor, token: int, count: int = 5) -> list[int]:
    """Return the tokens that cost the fewest of the bits (V,), and `token` if it isn't there."""
    rivals = bits.topk(min(count, len(bits)), largest=False).indices.tolist()
    return rivals if token in rivals else [*rivals, token]


def sampled_from(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities (V,) by which `sampling.draw_token` draws, from the logits (V,)."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1)
    logits = (logits - logits.max()) / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits.softmax(dim=-1)


def continue_text(
    model: GPT, texts: Texts, tokens: Sequence[int], sampling: Sampling, seed: int, limit: int
) -> list[int]:
    """Return what the network writes after some tokens, up to a limit or the end of the text.

    The random numbers of step n are the same, whatever the sampling.
    """
    context = min(model.sizes.context, len(tokens) + limit)
    written: list[int] = []
    for (token,) in next_tokens(model, [tokens], sampling, [seed], context, end=texts.mark):
        if token is None or token in texts.ends:
            break
        written.append(token)
    return written
