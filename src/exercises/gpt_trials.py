"""Small runs that show a mistake of the language model at work, as those of trials.py do.

They take the network of runs/gpt if there is one that can show the mistake, and otherwise train a
small one.
"""

import math
import runpy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from exercises.holes import ROOT, SOURCES

TEXT = "colorsys.py"  # short enough to be learned by heart, which takes positions and all heads
STEPS = 120
CONTEXT = 32  # tokens of the small network
MEASURED = 1500  # characters of a text
WRITTEN = 24  # tokens
MARK = 0  # the token before each document, which also ends one


def text_path(module: Any) -> Path:
    """Return the path of TEXT, a file of the standard library."""
    return module.standard_library().path / TEXT


def right_script(name: str) -> Any:
    """Return the names of a script as it stands in src/."""
    return SimpleNamespace(**runpy.run_path(str(SOURCES / name), run_name="right"))


def train_small(module: Any, steps: int) -> tuple[Any, Any, float]:
    """Train a small network by a gpt.py; return it, its tokenizer, and its last training loss."""
    settings = module.Settings(
        d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=64, context=CONTEXT,
        vocab_size=400, steps=steps, batch_size=16,
    )  # fmt: skip
    text = module.Text(text_path(module), ())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, texts, corpus = module.begin(None, text, settings, folder / "corpus", 0)
        run = module.make_run(folder, model, {}, settings, 0, math.inf)
        *_, last = module.train(run, corpus, texts, settings)
    return model, texts.tokenizer, last.training_loss


def trained(
    module: Any, shows: Callable[[Any], bool] = lambda sizes: True, steps: int = STEPS
) -> tuple[Any, Any]:
    """Return a network of a gpt.py, with weights that the right script has trained.

    They are those of runs/gpt if that opens and `shows` says that its sizes can show the mistake.
    """
    right = right_script("gpt.py")
    try:
        model, published = right.open_model(ROOT / "runs/gpt")
        tokenizer = published.tokenizer
        usable = shows(model.sizes)
    except OSError:
        usable = False
    if not usable:
        model, tokenizer, _ = train_small(right, steps)
    copy = module.GPT(model.sizes)
    copy.load_state_dict(model.state_dict())
    return copy.eval(), tokenizer


def measured_tokens(module: Any, tokenizer: Any) -> tuple[Tensor, int]:
    """Return the tokens of the beginning of TEXT, after a mark, and its bytes."""
    text = text_path(module).read_text(encoding="utf-8")[:MEASURED]
    return torch.tensor([MARK, *tokenizer.encode(text).ids]), len(text.encode())


def bits_per_byte(module: Any, model: Any, tokenizer: Any) -> float:
    """Measure a network."""
    ids, size = measured_tokens(module, tokenizer)
    return module.measure_bits(model, [ids]).sum().item() / size


def write(module: Any, model: Any, prompts: Sequence[Sequence[int]], cached: bool) -> list[Any]:
    """Continue prompts by the likeliest tokens; return the tokens of each."""
    context = max(map(len, prompts)) + WRITTEN
    columns = module.next_tokens(
        model, prompts, module.Sampling(0), range(len(prompts)), context, MARK, cached
    )
    rows = zip(*columns, strict=True)
    return [[token for token in row if token is not None][:WRITTEN] for row in rows]


def list_of_layers(module: Any) -> dict[str, Any]:
    """Count the parameters that an optimizer of transformer.py gets, and the tensors of a file."""
    model = module.Transformer(100, module.Sizes())
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": count, "tensors": len(model.state_dict())}


def layout(module: Any) -> dict[str, Any]:
    """Measure weights that another script has trained."""
    model, tokenizer = trained(module)
    return {"bits": bits_per_byte(module, model, tokenizer)}


def tiled_heads(module: Any) -> dict[str, Any]:
    """Measure weights with grouped heads that another script has trained."""
    model, tokenizer = trained(module, lambda sizes: 1 < sizes.num_kv_heads < sizes.num_heads)
    return {"bits": bits_per_byte(module, model, tokenizer)}


def mask_of_heads(module: Any) -> dict[str, Any]:
    """Continue as many prompts as there are heads at once, and alone; then one prompt less."""
    model, tokenizer = trained(module, lambda sizes: sizes.num_heads > 2)
    ids, _ = measured_tokens(module, tokenizer)
    rows = model.sizes.num_heads
    prompts = [ids[: 2 + n].tolist() for n in range(rows)]
    together = write(module, model, prompts, cached=True)
    alone = [write(module, model, [prompt], cached=True)[0] for prompt in prompts]
    error = "no error"
    try:
        write(module, model, prompts[1:], cached=True)
    except RuntimeError as raised:
        error = f"{type(raised).__name__}: {raised}".partition("\n")[0]
    differ = sum(a != b for a, b in zip(together, alone, strict=True))
    return {"rows": rows, "fewer": rows - 1, "differ": differ, "error": error}


def no_causal_mask(module: Any, steps: int = STEPS) -> dict[str, Any]:
    """Train, and measure the network with and without the rest of the text in sight."""
    model, tokenizer, loss = train_small(module, steps)
    ids, size = measured_tokens(module, tokenizer)
    ids = ids[: CONTEXT + 1]
    size = len(tokenizer.decode(ids[1:].tolist()).encode())
    bits = module.measure_bits(model, [ids]).sum().item() / size
    alone = 0.0
    for t in range(1, len(ids)):
        alone += module.measure_bits(model, [ids[: t + 1]])[-1].item() / size
    return {"loss": loss, "bits": bits, "alone": alone}


def unshifted_labels(module: Any, steps: int = STEPS) -> dict[str, Any]:
    """Train, measure, and write."""
    model, tokenizer, loss = train_small(module, steps)
    ids, _ = measured_tokens(module, tokenizer)
    (written,) = write(module, model, [ids[:5].tolist()], cached=True)
    kinds = len({*written})
    bits = bits_per_byte(module, model, tokenizer)
    return {"loss": loss, "bits": bits, "written": len(written), "kinds": kinds}


def position_of_queries(module: Any) -> dict[str, Any]:
    """Continue a text with and without the cache, and measure without it."""
    model, tokenizer = trained(module)
    ids, _ = measured_tokens(module, tokenizer)
    prompt = ids[:8].tolist()
    (cached,) = write(module, model, [prompt], cached=True)
    (plain,) = write(module, model, [prompt], cached=False)
    same = [a == b for a, b in zip(cached, plain, strict=False)]
    same.append(False)
    bits = bits_per_byte(module, model, tokenizer)
    return {"bits": bits, "same": same.index(False), "written": len(plain)}


def crossing_token(module: Any) -> dict[str, Any]:
    """Sum up the probability that top-p keeps of 0.9, for each token of a text."""
    lesson = right_script("gpt.py")
    model, tokenizer = trained(lesson)
    ids, _ = measured_tokens(lesson, tokenizer)
    with torch.inference_mode():
        logits = model(ids[:CONTEXT].unsqueeze(0))[0].double()
    kept = module.keep_top_p(logits, 0.9).isfinite()
    shares = (logits.softmax(dim=-1) * kept).sum(dim=-1)
    return {"least": shares.min().item(), "below": int((shares < 0.9).sum()), "rows": len(shares)}
