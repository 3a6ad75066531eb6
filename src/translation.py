#!/usr/bin/env python3
"""The Transformer learns to translate, with everything that real work needs.

Run `poetry run src/translation.py`. It learns phrases that Babel makes in German and English, in
about two minutes. `--data DIR` gives it your own parallel text: train.de, val.de, test*.de and the
same with .en, one sentence per line, plain or gzipped, of any size. It saves a checkpoint every few
minutes, after each epoch, and on Ctrl-C or SIGTERM (`--resume` continues), and tests the network.
Results go to runs/translation/, where `--translate "vor 3 Tagen"` finds them.
`poetry run torchrun --nproc-per-node 2 src/translation.py ...` trains with two processes.
"""

import argparse
import copy
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.font_manager import fontManager
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.bleu import BLEUScore
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attention import draw_heads
from decoding.search import autocast, translate
from inputs.pairs import (
    Corpus,
    Pair,
    Tests,
    count_seen,
    cut,
    find_tests,
    make_batches,
    open_corpus,
    prepare_corpus,
    read_tests,
)
from inputs.phrases import check_languages, phrases_name, write_phrases
from inputs.text import BOS, EOS, MAX_LENGTH, PAD, decode_lines, open_tokenizer
from running.processes import (
    alone,
    by_each,
    by_first,
    joined_processes,
    rank_and_world,
    synced,
)
from running.runs import Epoch, Run, check_start, going_on, set_aside
from running.settings import add_settings, check_settings, flag, read_settings, setting
from running.shell import (
    clear_parts,
    command,
    existing_folder,
    make_parser,
    number,
    open_weights,
    printable,
    read_weights,
    refusing,
    save_weights,
    write,
)
from transformer import (
    DecoderLayer,
    EncoderLayer,
    Sizes,
    Transformer,
    learning_rate,
    look_inside,
)

FONTS = (  # the first that has a character draws it
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC",
    "Yu Gothic", "Malgun Gothic", "Microsoft YaHei", "WenQuanYi Zen Hei", "Noto Sans Devanagari",
    "Noto Sans Thai",
)  # fmt: skip
RESULTS = ("model.safetensors", "attention.png")  # besides those of every run
UNSPACED = {"ja", "th", "yue", "km", "lo", "my"}  # languages that put no spaces between words


@dataclass(frozen=True)
class Settings(Sizes):
    """Sizes of the network and of its training. Raises ValueError if one is out of range."""

    d_model: int = setting(256, 1, 4096, "size of the vectors")
    num_heads: int = setting(4, 1, 64, "heads of each attention")
    num_layers: int = setting(3, 1, 48, "layers of the encoder, and of the decoder")
    d_ff: int = setting(512, 1, 16_384, "size inside the feed-forward network")
    dropout: float = setting(0.3, 0.0, 0.9, "share of numbers set to 0 in training")
    smoothing: float = setting(0.2, 0.0, 0.9, "share of each label spread over all tokens, 5.4")
    norm_first: bool = setting(True, False, True, "put LayerNorm before each sublayer, not after")
    vocab_size: int = setting(6000, 300, 100_000, "tokens in the vocabulary, at most")
    batch_tokens: int = setting(2048, 1, 1_000_000, "tokens per step, with both sides and padding")
    part_tokens: int = setting(8192, 1, 1_000_000, "tokens that a process computes at once")
    warmup: int = setting(1200, 1, 1_000_000, "steps during which the learning rate rises")
    epochs: int = setting(18, 1, 10_000, "passes over the text")
    average: int = setting(
        1,
        1,
        100,
        "last epochs whose weights are averaged, 6.1; with 1, the rate falls to 0 instead",
    )

    def __post_init__(self) -> None:
        """Check the settings, which may come from a file."""
        check_settings(self)
        if self.d_model % self.num_heads:
            raise ValueError(f"{flag('d_model')}: must be divisible by num_heads {self.num_heads}")


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


def save_model(path: Path, model: Transformer, tokenizer: Tokenizer, settings: Settings) -> None:
    """Write everything needed for translation to one file."""
    about = {"settings": json.dumps(asdict(settings)), "tokenizer": tokenizer.to_str()}
    save_weights(path, model, about)


def average_weights(model: Transformer, epoch: int, count: int, folder: Path) -> Transformer:
    """Save the weights of an epoch; return a network with the mean of the last `count` epochs'.

    Raises OSError if they can't be written or read.
    """
    last = range(max(1, epoch - count + 1), epoch + 1)
    paths = [folder / f"weights-{n % count}.safetensors" for n in last]
    paths[-1].unlink(missing_ok=True)  # if the write fails, no old epoch's may remain
    clear_parts(paths[-1])
    save_weights(paths[-1], model, {})
    with refusing(folder, "the weights of the last epochs can't be averaged"):
        states = [read_weights(path)[0] for path in paths]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    average = copy.deepcopy(model)
    average.load_state_dict(mean)
    return average


def open_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read a file that `save_model` wrote. Raises OSError if `path` is not such a file."""

    def make(about: dict[str, str]) -> Transformer:
        settings = Settings(**json.loads(about["settings"]))
        tokenizer = open_tokenizer(about["tokenizer"])
        if sorted(tokenizer.get_vocab().values()) != [*range(tokenizer.get_vocab_size())]:
            raise ValueError("the tokens of its vocabulary aren't numbered from 0 on")
        return make_model(settings, tokenizer)

    model, about = open_weights(path, make)
    return model, open_tokenizer(about["tokenizer"])


def batch_loss(model: nn.Module, corpus: Corpus, rows: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of some pairs in nats, summed over the tokens of the targets."""
    source = corpus.sequences(rows, 0)
    target = corpus.sequences(rows, 1)
    with autocast(source.device):
        logits = model(source, target[:, :-1]).flatten(0, 1)
        labels = target[:, 1:].flatten()
        return F.cross_entropy(
            logits, labels, ignore_index=PAD, reduction="sum", label_smoothing=smoothing
        )


def add_gradients(
    model: nn.Module, corpus: Corpus, batch: Tensor, count: int, settings: Settings
) -> Tensor:
    """Add the gradient of the mean loss of a batch with `count` labels; return the summed loss.

    Each of several processes takes its share, in parts that fit into memory, and returns its own
    loss. DDP averages the gradients once, with the last part.
    """
    rank, world = rank_and_world()
    share = batch[rank::world]
    weight = world / count
    if len(share) == 0:  # takes part, and adds nothing
        share = batch[:1]
        weight = 0.0
    parts = share.tensor_split(cut(corpus.lengths[share], settings.part_tokens)[:-1])
    total = torch.zeros((), device=corpus.tokens.device)
    for n, part in enumerate(parts, start=1):
        with synced(model, last=n == len(parts)):
            loss = batch_loss(model, corpus, part, settings.smoothing)
            (loss * weight).backward()
        total = total + loss.detach() * (weight > 0)
    return total


def scheduled_rate(run: Run, batches: int, settings: Settings) -> float:
    """Return the learning rate of the next step, in an epoch of so many batches: section 5.3.

    Unless the last weights are averaged, it also falls to 0, which the paper's does not.
    """
    progress = run.progress
    rate = learning_rate(progress.step + 1, settings.d_model, settings.warmup)
    if settings.average > 1:
        return rate
    return rate * (1 - (progress.epoch + progress.batch / batches) / settings.epochs)


def train_epoch(run: Run, model: nn.Module, corpus: Corpus, settings: Settings) -> None:
    """Train from the checkpoint on to the end of the epoch."""
    (optimizer,) = run.optimizers
    batches = make_batches(corpus.lengths, settings.batch_tokens, run.epoch_generator())
    model.train()
    for batch in run.steps(batches):
        count = int((corpus.lengths[batch, 1] - 1).sum())  # labels
        optimizer.param_groups[0]["lr"] = scheduled_rate(run, len(batches), settings)
        optimizer.zero_grad()
        loss = add_gradients(model, corpus, batch, count, settings)
        optimizer.step()
        run.add(loss, count)


@torch.inference_mode()
def mean_loss(model: Transformer, corpus: Corpus, tokens: int) -> float:
    """Return the mean cross-entropy of the targets' tokens, in nats.

    Raises FloatingPointError if it is not finite.
    """
    model.eval()
    batches = make_batches(corpus.lengths, tokens, torch.Generator().manual_seed(0))
    total = sum(batch_loss(model, corpus, rows, smoothing=0.0).item() for rows in batches)
    if not math.isfinite(total):
        raise FloatingPointError(f"the validation loss became {total}; a longer warmup may help")
    return total / int((corpus.lengths[:, 1] - 1).sum())


def validate(
    run: Run[Transformer], validation: Corpus, tokenizer: Tokenizer, settings: Settings
) -> float:
    """Return the validation loss; save the network if that is the lowest so far."""
    model = run.model
    if settings.average > 1:
        with going_on():
            model = average_weights(model, run.progress.epoch + 1, settings.average, run.out)
    loss = mean_loss(model, validation, settings.part_tokens)
    if loss < run.progress.best:
        with going_on(strict=run.in_last_epoch):
            save_model(run.out / "model.safetensors", model, tokenizer, settings)
            run.mark_best(loss)
    return loss


def train(
    run: Run[Transformer],
    corpus: Corpus,
    validation: Corpus,
    tokenizer: Tokenizer,
    settings: Settings,
) -> Iterator[Epoch]:
    """Train to the last epoch; yield the numbers of each epoch once they are saved."""
    model: nn.Module = run.model
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    with run.stoppable():
        while not run.ended:
            train_epoch(run, model, corpus, settings)
            loss = by_first(lambda: validate(run, validation, tokenizer, settings))
            run.end_epoch(loss)
            yield run.progress.rows[-1]


def bleu_tokenizer(language: str) -> str:
    """Return how BLEU finds the words of a language: in most, by spaces and punctuation."""
    code = re.split("[-_]", language)[0].lower()
    return {"zh": "zh"}.get(code, "char" if code in UNSPACED else "13a")


def score(pairs: Sequence[Pair], found: Sequence[str], language: str) -> dict[str, float]:
    """Return the share of exact translations, and BLEU and chrF by sacrebleu (Post 2018).

    Their names include sacrebleu's signature, so that others can compute the same scores.
    """
    words = bleu_tokenizer(language)
    targets = [target for _, target in pairs]
    exact = [target == text for target, text in zip(targets, found, strict=True)]
    scores = {"exactly": 100 * sum(exact) / len(exact)}
    for metric in (BLEU(tokenize=words), BLEU(tokenize=words, lowercase=True), CHRF()):
        result = metric.corpus_score(found, [targets])
        name = f"{type(metric).__name__}  {metric.get_signature()}"
        if isinstance(result, BLEUScore) and not result.totals[-1]:
            name += "  (which is 0 if no translation has four words)"
        scores[name] = result.score
    return scores


def draw_attention(model: Transformer, tokenizer: Tokenizer, pair: Pair) -> bytes:
    """Draw where each head of the last layer looks to predict each token: a PNG."""
    ids = [encoding.ids[: MAX_LENGTH - 2] for encoding in tokenizer.encode_batch([*pair])]
    device = model.positions.device
    source = torch.tensor([[*ids[0], EOS]], device=device)
    target = torch.tensor([[BOS, *ids[1]]], device=device)
    weights = look_inside(model, source, target)
    last = f"decoder.{len(model.decoder) - 1}.cross_attention"
    columns, rows = (  # a $ would begin a formula
        [tokenizer.decode([i]).replace("$", r"\$") for i in row] + ["end"] for row in ids
    )
    installed = {font.name for font in fontManager.ttflist}
    families = [name for name in FONTS if name in installed]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that none of the fonts has becomes a box
        return draw_heads(weights[last][0].cpu(), rows, columns)


def save_results(
    run: Run, tests: Tests, language: str, beam: int
) -> tuple[dict[str, dict[str, float]], dict[str, list[str | None]]]:
    """Test the best network and save the results; return scores and translations.

    A sentence that is too long, whose translation is None, is scored as empty.
    """
    model, tokenizer = open_model(run.out / "model.safetensors")
    model.to(run.device)
    scores = {}
    found = {}
    for name, pairs in tests.items():
        sources = [source for source, _ in pairs]
        found[name] = translate(model, tokenizer, sources, beam)
        texts = [text or "" for text in found[name]]
        scores[name] = score(pairs, texts, language)
    run.save_metrics(test={"beam": beam} | scores)
    example = next(pair for pair in next(iter(tests.values())) if all(map(str.strip, pair)))
    write(run.out / "attention.png", draw_attention(model, tokenizer, example))
    return scores, found


def show_translations(model: Transformer, tokenizer: Tokenizer, text: str, beam: int) -> int:
    """Print the translation of a text, or of lines if it is `-`; return 1 if one is too long."""
    lines: Iterator[str] = iter([normalize("NFC", text)])
    at_once = 1
    if text == "-":
        if sys.stdin is None:
            raise OSError("there is no standard input")
        lines = decode_lines(sys.stdin.buffer, "standard input")
        at_once = 1 if sys.stdin.isatty() else 1000  # a person waits for each answer
    elif any(category(character) == "Cs" for character in text):  # a byte that isn't UTF-8
        raise OSError("the text of --translate is not UTF-8")
    done = 0
    status = 0
    quiet = text != "-" or sys.stdout.isatty()
    bar = tqdm(unit=" lines", leave=False, disable=quiet or None)
    while chunk := list(islice(lines, at_once)):
        for found in translate(model, tokenizer, chunk, beam):
            done += 1
            if found is None:
                status = 1
                print(f"line {done} is longer than {MAX_LENGTH} tokens", file=sys.stderr)
            print((found or "").replace("\n", " "), flush=True)
        bar.update(len(chunk))
    bar.close()
    return status


def open_data(folder: Path | None, languages: Sequence[str], out: Path) -> tuple[Path, Tests]:
    """Return the folder of the text, and its tests; without a folder, phrases are written first."""
    if folder is None:
        folder = out / phrases_name(languages)
        write_phrases(folder, languages)
    for name in find_tests(folder, languages)[1]:
        print(f"{printable(name)} is left out: it has only one side", file=sys.stderr)
    return folder, read_tests(folder, languages)


def open_encoded(folder: Path, device: torch.device) -> tuple[Corpus, Corpus, Tokenizer]:
    """Open what `prepare_corpus` made: the training and the validation text, and the tokenizer."""
    corpus, validation = (open_corpus(folder / split).to(device) for split in ("train", "val"))
    tokenizer = open_tokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return corpus, validation, tokenizer


def make_run(
    out: Path,
    settings: Settings,
    text: dict[str, Any],
    tokenizer: Tokenizer,
    device: torch.device,
    seed: int,
    save_minutes: float,
) -> Run[Transformer]:
    """Make a network and its optimizer, and the run that trains it on the text so described."""
    torch.manual_seed(seed)
    model = make_model(settings, tokenizer).to(device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
    fixed = text | asdict(settings)
    free = {"part_tokens": fixed.pop("part_tokens")}  # a resumed run may have less memory
    return Run(out, model, [optimizer], fixed, settings.epochs, seed, free, save_minutes)


def show_training(
    run: Run[Transformer],
    corpus: Corpus,
    validation: Corpus,
    tokenizer: Tokenizer,
    settings: Settings,
    counts: dict[str, int],
) -> None:
    """Train, and print a line per epoch, in the first of several processes."""
    rank, _ = rank_and_world()
    if rank == 0:
        for split, kept in (("train", corpus), ("val", validation)):
            if left_out := counts[split] - len(kept.lengths):
                print(f"{left_out:,} pairs of {split} are left out: empty, or too long")
        count = sum(p.numel() for p in run.model.parameters())
        print(f"{count:,} parameters on {run.device}, {len(corpus.lengths):,} pairs per epoch\n")
        print("epoch  training loss  validation loss  seconds", flush=True)
    for row in train(run, corpus, validation, tokenizer, settings):
        if rank == 0:
            print("{:5}  {:13.4f}  {:15.4f}  {:7.1f}".format(*row), flush=True)


def show_results(run: Run, folder: Path, languages: Sequence[str], tests: Tests, beam: int) -> None:
    """Test the best network; print the scores, and three examples of each test."""
    scores, found = save_results(run, tests, languages[1], beam)
    seen = count_seen(folder, languages, tests)
    for name, pairs in tests.items():
        print(f"\n{printable(name)}: {len(pairs):,} sentences")
        if too_long := found[name].count(None):
            print(f"{too_long:,} of them are longer than {MAX_LENGTH} tokens, and count as empty")
        if seen[name]:
            print(f"{seen[name]:,} of their sources stand in the training text, too")
        for metric, value in scores[name].items():
            print(f"{value:7.2f}  {metric}")
        for (source, target), text in list(zip(pairs, found[name], strict=True))[:3]:
            print(f"\n  {printable(source)}\n  {printable(text or '')}")
            print(f"  {printable(target)} (reference)")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line; the settings begin as those of a preset."""
    parser = make_parser(__doc__, "translation")
    add = parser.add_argument
    once = parser.add_mutually_exclusive_group().add_argument
    add("--data", type=existing_folder, metavar="DIR", help="parallel text; without it, phrases")
    add("--from", dest="source", default="de", help="language to translate from")
    add("--to", dest="target", default="en", help="language to translate to")
    once("--resume", action="store_true", help="continue from a checkpoint, if there is one")
    once("--restart", action="store_true", help="begin anew; old results move to previous/")
    add("--save-minutes", type=number(0.0, 1e6), default=10.0, help="between checkpoints")
    add("--translate", metavar="TEXT", help="translate and exit; - reads stdin")
    add("--beam", type=number(1, 100), default=4, help="unfinished translations to keep")
    add("--preset", choices=PRESETS, help="set of settings; small with --data, else phrases")
    add_settings(parser, PRESETS)
    args = parser.parse_args(argv)
    preset = PRESETS[args.preset or ("small" if args.data else "phrases")]
    try:
        if not args.data:
            check_languages([args.source, args.target])
        return args, read_settings(args, preset)
    except ValueError as error:
        parser.error(f"argument {error}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, test and save, or translate; return the exit status."""
    started = time.perf_counter()
    args, settings = parse(argv)
    out = args.out
    if args.translate is not None:
        model, tokenizer = open_model(out / "model.safetensors")
        return show_translations(model.to(args.device), tokenizer, args.translate, args.beam)
    languages = [args.source, args.target]
    out.mkdir(parents=True, exist_ok=True)
    with joined_processes(args.device), alone(out):
        by_first(lambda: check_start(out, args.resume, args.restart))
        folder, tests = by_first(lambda: open_data(args.data, languages, out))
        encoded, counts = by_first(
            lambda: prepare_corpus(folder, languages, settings.vocab_size, out / "corpus")
        )
        corpus, validation, tokenizer = by_each(lambda: open_encoded(encoded, args.device))
        by_first(lambda: set_aside(out, RESULTS, args.resume))
        text = {"languages": languages, "text": encoded.name}
        run = make_run(out, settings, text, tokenizer, args.device, args.seed, args.save_minutes)
        run.resume()
        show_training(run, corpus, validation, tokenizer, settings, counts)
        by_first(lambda: show_results(run, folder, languages, tests, args.beam))
        if rank_and_world()[0] == 0:
            seconds = time.perf_counter() - started
            print(f"\nSaved in {printable(out)} after {seconds:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(record(main)())
