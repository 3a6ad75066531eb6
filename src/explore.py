#!/usr/bin/env python3
"""See it move: the formula, heads, your own networks and their search, on an interactive page.

Run `make explore`, which opens this marimo notebook in the browser, served from this machine only.
It computes with the functions of the other scripts, and shows the networks that they saved in
runs/, or trains small ones on the spot and saves them in runs/explore/.
"""

import marimo

app = marimo.App(width="medium", app_title="Attention, interactive")

with app.setup:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    import marimo as mo
    import torch

    import gpt
    from attention import SENTENCE, positional_encoding
    from decoding.sampling import Sampling
    from explorer import pictures, switches, trained
    from explorer.pictures import decimal, heat, plot, side_by_side
    from inputs.dates import find_problem, normalize, sample_dates, split_days
    from inputs.text import BOS
    from transformer import (
        BATCHES,
        WARMUP,
        Sizes,
        Transformer,
        learning_rate,
        look_inside,
        open_model,
    )  # fmt: skip

    RUNS = Path("runs")  # where the scripts that are run from the same folder save
    PUBLISHED = Path("data/smollm2")  # where `make smollm2` puts it
    OWN = "your own"
    SMOLLM2 = "SmolLM2"
    WRITTEN = 32  # tokens
    TEXT = """\
The cat sees the dog, and the dog sees the cat.
The cat runs, and the dog runs after the"""
    FORMULA = "Formula"
    HEADS = "Heads"
    TRANSFORMER = "Transformer"
    LANGUAGE = "Language model"
    SEARCH = "Search"
    PHOTO = "Photo"
    PAGES = (FORMULA, HEADS, TRANSFORMER, LANGUAGE, SEARCH, PHOTO)


@app.function
def with_bar(train: Callable[..., None], path: Path, steps: int) -> None:
    """Train a network and save it, with a progress bar on the page."""
    title = "Training on the spot"
    with mo.status.progress_bar(total=steps, title=title, remove_on_exit=True) as bar:
        train(path, bar.update)


@app.function
def line_up(*items: object) -> mo.Html:
    """Put items side by side, or below each other where there is no room."""
    return mo.hstack(items, justify="start", align="center", gap=1.5, wrap=True)


@app.function
def tell_leak(whole: float, without: float) -> str:
    """Say what the bits of a text mean without the causal mask."""
    sees = "Without the mask, the network also sees the very token that it should predict."
    if without < whole:
        return f"{sees} Fewer bits, and no better: as it writes, there is no such token yet."
    return f"{sees} But it was trained with the mask: in this text, what comes later misleads it."


@app.cell
def _():
    page = mo.ui.dropdown(PAGES, FORMULA, label="Page")  # tabs can't be reached by keyboard
    runs = Path(mo.cli_args().get("runs") or RUNS)
    published = Path(mo.cli_args().get("model") or PUBLISHED)
    mo.vstack([mo.Html(pictures.STYLE), mo.md("# See it move"), page])
    return page, published, runs


@app.cell
def _():
    sentence = mo.ui.text(SENTENCE, label="Sentence", full_width=True)
    d_k = mo.ui.slider(steps=[1, 2, 4, 16, 64, 256, 1024], value=4, label="d_k", show_value=True)
    mask = mo.ui.dropdown([*switches.RIGHT_MASKS, *switches.WRONG_MASKS], "none", label="Mask")
    scaled = mo.ui.switch(True, label="divide by √d_k")
    by_row = mo.ui.switch(True, label="softmax of each row (off: of each column)")
    return by_row, d_k, mask, scaled, sentence


@app.cell
def _(by_row, d_k, mask, page, scaled, sentence):
    mo.stop(page.value != FORMULA)
    formula = mo.md(r"$\mathrm{softmax}(QK^\mathsf{T}/\sqrt{d_k})\,V$, with a sentence of your own")
    mo.vstack([formula, sentence, line_up(d_k, mask, scaled, by_row)])


@app.cell
def _(d_k, sentence):
    words, problem = trained.split_words(sentence.value)
    _x, _head = switches.draw_sentence(words or ["-"], d_k.value)
    drawn = {"Q": _head.W_q(_x), "K": _head.W_k(_x), "V": _head.W_v(_x)}
    Q, K, V = (
        mo.ui.matrix(M[:, :4], step=0.1, precision=2, row_labels=words or ["-"], label=name)
        for name, M in drawn.items()
    )
    _places = {f"{i + 1}. {word}": i for i, word in enumerate(words or ["-"])}
    followed = mo.ui.dropdown(_places, [*_places][min(1, len(_places) - 1)], label="Follow")
    return K, Q, V, drawn, followed, problem, words


@app.cell
def _(K, Q, V, d_k, followed, page, problem):
    mo.stop(page.value != FORMULA)
    mo.stop(problem, mo.callout(problem, "warn"))
    _note = f" These are 4 of the {d_k.value} columns of Q and K." if d_k.value > 4 else ""
    _how = mo.md(f"Drag a number, or press Enter on it and type.{_note}")
    mo.vstack([_how, line_up(Q, K, V), followed])


@app.cell
def _(K, Q, V, by_row, drawn, followed, mask, page, problem, scaled, words):
    mo.stop(page.value != FORMULA or problem)
    _Q, _K, _V = (torch.tensor(matrix.value).double() for matrix in (Q, K, V))
    _Q, _K = (torch.cat((M, drawn[n][:, 4:]), dim=1) for n, M in (("Q", _Q), ("K", _K)))
    _steps = switches.attend(_Q, _K, _V, scaled.value, mask.value, by_row.value)
    _sums = torch.cat((_steps.weights, _steps.weights.sum(dim=1, keepdim=True)), dim=1)
    _faults = switches.name_faults(_steps.weights, mask.value)
    _tables = side_by_side(
        heat("Scores QKᵀ", _steps.scores, words, words),
        heat("What the softmax gets", _steps.scaled, words, words),
        heat("Weights, and their sum", _sums, words, [*words, "sum"]),
        heat("Output", _steps.output, words, ["1", "2", "3", "4"][: _V.shape[1]]),
        pictures.by_hand(_steps, followed.value, words, by_row.value),
    )
    _kind = "danger" if _faults else "success"
    _verdict = mo.callout(mo.md("\n\n".join(_faults) or "Each row adds up to 1."), _kind)
    mo.vstack([_verdict, mo.Html(_tables)])


@app.cell
def _():
    length = mo.ui.slider(4, 60, value=30, label="positions", show_value=True)
    d_model = mo.ui.slider(steps=[4, 8, 16, 32, 64], value=32, label="d_model", show_value=True)
    place = mo.ui.slider(0, 59, value=9, label="follow position", show_value=True)
    placed = mo.ui.switch(False, label="add positions to the words")
    order = mo.ui.slider(1, 9, value=1, label="order", show_value=True)
    learn_pairs = mo.ui.run_button(label="Train two heads here (about 10 s)")
    without = mo.ui.dropdown({"none": None, "1": 0, "2": 1}, "none", label="Head switched off")
    return d_model, learn_pairs, length, order, place, placed, without


@app.cell
def _(d_model, length, page, place):
    mo.stop(page.value != HEADS)
    _about = mo.md("### Positions\nA row per position, from 0; blue is positive, orange negative")
    mo.vstack([_about, line_up(length, d_model, place)])


@app.cell
def _(d_model, length, page, place):
    mo.stop(page.value != HEADS)
    _P = positional_encoding(length.value, d_model.value)
    _products = _P @ _P.T
    _i = min(place.value, length.value - 1)
    _near = [*range(max(0, _i - 4), min(length.value, _i + 5))]
    _title = f"Position {_i} times its neighbors"
    _names = [str(j) for j in _near]
    _tables = side_by_side(
        pictures.pixels("The sine pattern", _P, 6),
        pictures.pixels("Dot products of all positions", _products),
        heat(_title, _products[[_i]][:, _near], [str(_i)], _names),
    )
    mo.Html(_tables)


@app.cell
def _(order, page, placed):
    mo.stop(page.value != HEADS)
    _about = mo.md("### Words shuffled\nWithout positions, attention can't tell the order of words")
    mo.vstack([_about, line_up(placed, order)])


@app.cell
def _(order, page, placed, words):
    mo.stop(page.value != HEADS)
    mo.stop(not words, mo.callout("Write a sentence on the page Formula first.", "warn"))
    _order, _before, _after = switches.shuffle(words, order.value, placed.value)
    _shuffled = " ".join(words[i] for i in _order)
    _parts = ["1", "2", "3", "4"]
    _most = (_before - _after).abs().max()
    _tables = side_by_side(
        heat(f"Outputs for “{' '.join(words)}”", _before, words, _parts),
        heat(f"The same words, from “{_shuffled}”", _after, words, _parts),
    )
    mo.Html(f"{_tables}<p>The largest difference is {_most:.2f}.</p>")


@app.cell
def _(learn_pairs, page, runs, without):
    mo.stop(page.value != HEADS)
    _here = runs / "explore/attention.safetensors"
    if learn_pairs.value:
        with_bar(trained.train_pairs, _here, trained.PAIR_STEPS)
    _paths = [runs / "attention/model.safetensors", _here]
    pairs, _problem = trained.open_first(_paths, trained.open_pairs)
    _about = mo.md("### Two heads\nThey predict each digit's mirror image and left neighbor")
    _needed = [mo.callout(_problem, "warn"), learn_pairs] if _problem else []
    mo.vstack([_about, *_needed, *([without] if pairs else [])])
    return (pairs,)


@app.cell
def _(page, pairs, without):
    mo.stop(page.value != HEADS or pairs is None)
    _weights, _digits, _shares = switches.score_pairs(pairs, without.value)
    _names = ["sequences", "mirror images", "left neighbors"]
    _titles = [f"Head {n + 1}{', off' if n == without.value else ''}" for n in (0, 1)]
    _heads = [heat(title, w, _digits, _digits) for title, w in zip(_titles, _weights, strict=True)]
    _about = "Predicted right, of 1,000 unseen sequences"
    _right = heat(_about, _shares.unsqueeze(0), ["share"], _names)
    mo.Html(side_by_side(_right, *_heads))


@app.cell
def _():
    date = mo.ui.text("12 de octubre de 1968", label="A date", full_width=True)
    positions, causal, memory, root = (mo.ui.switch(True, label=x) for x in switches.PARTS)
    _heads = {"none": None} | switches.name_heads(Transformer(4, Sizes()))
    off_head = mo.ui.dropdown(_heads, "none", label="Head switched off")
    learn_dates = mo.ui.run_button(label="Train a Transformer here (about a minute)")
    return causal, date, learn_dates, memory, off_head, positions, root


@app.cell
def _(causal, date, memory, off_head, page, positions, root):
    mo.stop(page.value not in (TRANSFORMER, SEARCH))
    _controls = line_up(positions, causal, memory, root, off_head)
    _note = mo.md("As it writes, there is no future to hide: the causal mask matters in training.")
    mo.vstack([date, _controls, _note] if page.value == TRANSFORMER else [date])


@app.cell
def _(learn_dates, page, runs):
    mo.stop(page.value not in (TRANSFORMER, SEARCH))
    _here = runs / "explore/transformer.safetensors"
    if learn_dates.value:
        with_bar(trained.train_dates, _here, trained.DATE_STEPS)
    _paths = [runs / "transformer/model.safetensors", _here]
    _found, _problem = trained.open_first(_paths, open_model)
    network, vocabulary = _found or (None, {})
    mo.vstack([mo.callout(_problem, "warn"), learn_dates] if _problem else [])
    return network, vocabulary


@app.cell
def _(causal, date, memory, network, off_head, page, positions, root, vocabulary):
    mo.stop(page.value != TRANSFORMER or network is None)
    source, _problem = trained.encode_date(date.value, vocabulary)
    mo.stop(source is None, mo.callout(_problem, "warn"))
    _parts = zip(switches.PARTS, (positions, causal, memory, root), strict=True)
    _off = [name for name, switch in _parts if not switch.value]
    changed = switches.switch_off(network, _off, off_head.value)
    tokens, _probabilities = switches.write_slowly(changed, source)
    answer = switches.spell(tokens[0].tolist(), vocabulary)
    _last = len(answer) + 1  # that of the end
    step = mo.ui.slider(1, _last, value=min(6, _last), label="Follow character", show_value=True)
    _table = mo.Html(pictures.likeliest(_probabilities[0, : len(answer) + 1], vocabulary))
    _problems = filter(None, (_problem, find_problem(date.value, answer)))
    _warnings = [mo.callout(problem, "warn") for problem in _problems]
    mo.vstack([*_warnings, mo.md(f"Prediction: **{answer or 'nothing'}**"), _table, step])
    return answer, changed, source, step, tokens


@app.cell
def _(network, page, vocabulary):
    mo.stop(page.value != TRANSFORMER or network is None)
    unseen = sample_dates(split_days()[2][:200], Random(2))
    whole = switches.score_dates(network, vocabulary, unseen)
    return unseen, whole


@app.cell
def _(changed, page, unseen, vocabulary, whole):
    mo.stop(page.value != TRANSFORMER)
    with mo.status.spinner("Reading 200 dates that it has never seen"):
        _shares = torch.tensor([[whole, switches.score_dates(changed, vocabulary, unseen)]])
    _title = "200 unseen dates predicted exactly"
    _names = ["whole network", "as it is now"]
    mo.Html(heat(_title, _shares, ["share"], _names))


@app.cell
def _(answer, changed, date, page, source, step, tokens):
    mo.stop(page.value != TRANSFORMER)
    _target = torch.tensor([[BOS, *tokens[0, : len(answer)].tolist()]])
    _weights = {name: w[0] for name, w in look_inside(changed, source, _target).items()}
    mo.Html(pictures.looks(_weights, step.value - 1, normalize(date.value), answer))


@app.cell
def _():
    learn_gpt = mo.ui.run_button(label="Train a small language model here (about a minute)")
    text = mo.ui.text_area(TEXT, label="A text", rows=4, debounce=200, full_width=True)
    rotated, hidden = (mo.ui.switch(True, label=name) for name in switches.GPT_PARTS)
    _bases = {"as trained": None} | {f"{10**n:,}": 10.0**n for n in range(1, 7)}
    base = mo.ui.dropdown(_bases, "as trained", label="Base of the frequencies")
    temperature = mo.ui.slider(0, 2, step=0.1, value=0.8, label="temperature", show_value=True)
    top_p = mo.ui.slider(0.05, 1, step=0.05, value=1, label="top-p", show_value=True)
    chance = mo.ui.slider(0, 9, value=0, label="seed", show_value=True)
    return base, chance, hidden, learn_gpt, rotated, temperature, text, top_p


@app.cell
def _(learn_gpt, page, published, runs):
    mo.stop(page.value != LANGUAGE)
    _here = runs / "explore/gpt"
    if learn_gpt.value:
        with_bar(trained.train_gpt, _here, trained.GPT_STEPS)
    own, _problem = trained.open_first([runs / "gpt", _here], gpt.open_model)
    _names = [OWN] * (own is not None) + [SMOLLM2] * published.exists()
    which = mo.ui.dropdown(_names, next(iter(_names), None), label="Network")
    _needed = [mo.callout(_problem, "warn"), learn_gpt] if _problem else []
    mo.vstack([mo.md("### What each token costs"), *_needed, *([which] if _names else [])])
    return own, which


@app.cell
def _(own, published, which):
    mo.stop(which.value is None)  # this stops all cells that need the network, too
    try:
        with mo.status.spinner("Opening the network"):
            language_model, texts = own if which.value == OWN else gpt.open_model(published)
    except OSError as _error:
        mo.stop(True, mo.callout(str(_error), "warn"))
    _sizes = language_model.sizes
    _heads = {"none": None} | {str(n + 1): n for n in range(_sizes.num_heads)}
    layer = mo.ui.dropdown({str(n + 1): n for n in range(_sizes.num_layers)}, "1", label="Layer")
    head_off = mo.ui.dropdown(_heads, "none", label="Head switched off")
    _few = [k for k in (1, 2, 3, 5, 10, 20, 50, 100) if k < _sizes.vocab_size]
    _steps = [*_few, _sizes.vocab_size]  # the last draws from all tokens
    top_k = mo.ui.slider(steps=_steps, value=_steps[-1], label="top-k", show_value=True)
    return head_off, language_model, layer, texts, top_k


@app.cell
def _(language_model, text, texts):
    _limit = trained.longest_text(language_model.sizes.context)
    encoded, _problem = trained.encode_text(text.value, texts, _limit)
    _note = mo.md(f"At most {_limit} tokens are read, so that each control answers at once.")
    mo.vstack([text, mo.callout(_problem, "warn") if _problem else _note])
    return (encoded,)


@app.cell
def _(base, encoded, head_off, hidden, layer, rotated):
    mo.stop(encoded is None)
    line_up(rotated, hidden, base, layer, head_off)


@app.cell
def _(encoded, language_model):
    mo.stop(encoded is None)
    whole_bits = switches.count_bits(
        switches.predict_each(language_model, encoded.ids), encoded.ids
    )
    _last = len(encoded.ends)
    follow = mo.ui.slider(1, _last, value=min(3, _last), label="Follow token", show_value=True)
    return follow, whole_bits


@app.cell
def _(base, encoded, head_off, hidden, language_model, layer, rotated):
    mo.stop(encoded is None)
    _parts = zip(switches.GPT_PARTS, (rotated, hidden), strict=True)
    _off = [name for name, switch in _parts if not switch.value]
    _head = None if head_off.value is None else (layer.value, head_off.value)
    changed_model = switches.change_gpt(language_model, _off, base.value, _head)
    predicted = switches.predict_each(changed_model, encoded.ids)
    return changed_model, predicted


@app.cell
def _(encoded, hidden, predicted, whole_bits):
    bits = switches.count_bits(predicted, encoded.ids)
    _length = len(encoded.text.encode())
    _sums = torch.stack((whole_bits.sum(), bits.sum()))
    _shares = _sums.unsqueeze(0) / _length
    _names = ["whole network", "as it is now"]
    _texts = [[f"{share:.3f}" for share in _shares[0].tolist()]]
    _table = heat("Bits per byte of the text", _shares, ["needed"], _names, _texts)
    _about = f"{len(bits)} tokens cost **{_sums[1]:.1f} bits**, and have {_length} bytes."
    _lesson = [] if hidden.value else [mo.callout(tell_leak(*_sums.tolist()), "warn")]
    mo.vstack([mo.md(_about), mo.Html(_table), *_lesson])
    return (bits,)


@app.cell
def _(bits, encoded, follow, predicted, texts):
    _n = follow.value - 1
    _row, _token = predicted[_n], encoded.ids[_n + 1]
    _rivals = switches.find_rivals(_row, _token)
    _names = [trained.name_token(token, texts) for token in _rivals]
    _tables = side_by_side(
        pictures.shaded(encoded.text, encoded.ends, bits.tolist(), _n),
        pictures.rivals(_row[_rivals], _names, _rivals.index(_token)),
    )
    mo.vstack([follow, mo.Html(_tables)])


@app.cell
def _(chance, encoded, temperature, top_k, top_p):
    mo.stop(encoded is None)
    _about = mo.md("### What comes next\nAt each step, the same seed draws by the same numbers")
    mo.vstack([_about, line_up(temperature, top_k, top_p, chance)])


@app.cell
def _(changed_model, chance, encoded, texts):
    plain = switches.continue_text(
        changed_model, texts, encoded.ids, Sampling(), chance.value, WRITTEN
    )
    return (plain,)


@app.cell
def _(changed_model, chance, encoded, plain, predicted, temperature, texts, top_k, top_p):
    _sampling = Sampling(temperature.value, top_k.value, top_p.value)
    _before = (-predicted[-1].double()).exp2()
    _after = switches.sampled_from(_before.log(), _sampling)
    _likeliest = _before.topk(10).indices.tolist()
    _names = {token: trained.name_token(token, texts) for token in _likeliest}
    _table = pictures.reshaped(_before, _after, _names)
    _written = switches.continue_text(
        changed_model, texts, encoded.ids, _sampling, chance.value, WRITTEN
    )
    _texts = [trained.spell_text(tokens, texts, encoded.ids) for tokens in (plain, _written)]
    _titles = ["As predicted: temperature 1, all tokens", "With the sliders, the same seed"]
    mo.Html(side_by_side(_table, pictures.two_texts(_titles, _texts)))


@app.cell
def _():
    beam = mo.ui.slider(1, 5, value=3, label="beam", show_value=True)
    alpha = mo.ui.slider(0, 2, step=0.1, value=1.2, label="length penalty", show_value=True)
    upto = mo.ui.slider(1, 12, value=12, label="show steps up to", show_value=True)
    return alpha, beam, upto


@app.cell
def _(alpha, beam, network, page, upto):
    mo.stop(page.value != SEARCH or network is None)
    _about = mo.md("### The beam as a tree\nNumbers are log P. Try 13 ju 1968, June or July")
    mo.vstack([_about, line_up(beam, alpha, upto)])


@app.cell
def _(alpha, beam, date, network, page, upto, vocabulary):
    mo.stop(page.value != SEARCH or network is None)
    _source, _problem = trained.encode_date(date.value, vocabulary)
    mo.stop(_source is None, mo.callout(_problem, "warn"))
    _found, _steps = switches.watch_beam(network, _source, beam.value, alpha.value)
    _greedy = switches.spell(switches.write_slowly(network, _source)[0][0].tolist(), vocabulary)
    _ended = sorted((b for step in _steps[1:] for b in step), key=lambda b: -b.score)[:5]
    _names = [switches.spell(branch.tokens, vocabulary) for branch in _ended]
    _texts = [(decimal(b.ended), str(len(b.tokens) + 1), decimal(b.score)) for b in _ended]
    _blank = torch.zeros(len(_texts), 3)
    _columns = ["log P", "length with end", "score"]
    _tables = side_by_side(
        pictures.tree(_steps[: upto.value], _found, vocabulary),
        heat("If it ended here: the five best", _blank, _names, _columns, _texts),
    )
    _beam = switches.spell(_found, vocabulary)
    _problems = filter(None, (_problem, find_problem(date.value, _beam)))
    _warnings = [mo.callout(problem, "warn") for problem in _problems]
    _answers = mo.md(f"The beam finds **{_beam}**, greedy search **{_greedy}**")
    mo.vstack([*_warnings, _answers, mo.Html(_tables)])


@app.cell
def _(page, runs):
    mo.stop(page.value != SEARCH)
    _steps = 3 * BATCHES
    _rates = [
        learning_rate(n, Sizes().d_model, WARMUP) * (1 - n / _steps) for n in range(1, _steps)
    ]
    _losses = trained.read_losses(runs).items()
    _plots = [plot(f"{name}: loss", "epoch", lines) for name, lines in _losses]
    _plots.append(plot("transformer.py: learning rate", "step", {"learning rate": _rates}))
    mo.vstack([mo.md("### Training: the runs in runs/"), mo.Html(side_by_side(*_plots))])


@app.cell
def _():
    photo = mo.ui.file(["image/*"], kind="area", label="Drop a photo of a garment here")
    return (photo,)


@app.cell
def _(page, photo):
    mo.stop(page.value != PHOTO)
    mo.vstack([mo.md("### A photo, as the network of fashion-mnist.py sees it"), photo])


@app.cell
def _(page, photo, runs):
    mo.stop(page.value != PHOTO or not photo.value)
    try:
        _path = runs / "fashion-mnist/model.safetensors"
        _image, _probabilities = trained.classify(photo.contents(), _path)
    except (OSError, ValueError) as _error:
        mo.stop(True, mo.callout(str(_error), "warn"))
    _column = torch.tensor([[p] for p in _probabilities.values()])
    _style = {"image-rendering": "pixelated"}
    _seen = mo.image(_image.numpy(), alt="what the network sees", width=224, style=_style)
    line_up(_seen, mo.Html(heat("Probabilities", _column, [*_probabilities], ["p"])))


if __name__ == "__main__":
    app.run()
