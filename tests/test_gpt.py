"""The network of gpt.py beside that of `transformers`, and the folder that both open."""

import bz2
import json
import lzma
import math
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import gpt as G
from decoding.cache import Cache
from inputs.documents import MARK_ID, is_held_out, learn_tokenizer
from inputs.pretrained import own_texts
from make_models import FOLDERS, MODELS, TEXT, assert_close, draw_weights
from running.shell import Stopped

TINY = G.Sizes(264, 8, 2, 4, 2, 4, 16, 64, tied=False)


def make(**changes):
    """Make a network in float64, the same every time."""
    return draw_weights(G.GPT(replace(TINY, **changes))).double()


def draw(*shape):
    torch.manual_seed(1)
    return torch.randint(TINY.vocab_size, shape)


# The network


def test_a_quarter_turn_takes_one_half_to_the_other():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = G.rotate(x, torch.zeros(1, 2), torch.ones(1, 2))
    assert turned.tolist() == [[[[-3.0, -4.0, 1.0, 2.0]]]]


def test_rotating_is_multiplying_complex_numbers():
    sizes = replace(TINY, d_k=8, theta=50.0)
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([0, 1, 2, 7, 30])
    angle = positions.unsqueeze(1) * G.frequencies(sizes)
    found = G.rotate(x, angle.cos(), angle.sin()).numpy()
    numbers = x[..., :4].numpy() + 1j * x[..., 4:].numpy()
    turned = numbers * np.exp(1j * np.outer(positions, 50 ** -np.arange(0, 1, 1 / 4)))
    np.testing.assert_allclose(found[..., :4], turned.real, atol=1e-5)
    np.testing.assert_allclose(found[..., 4:], turned.imag, atol=1e-5)


def test_each_row_may_have_its_own_angles_and_types_and_gradients_stay():
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 8).double(), torch.randn(2, 1, 5, 4).double()
    found = G.rotate(x, angle.cos(), angle.sin())
    for row in (0, 1):
        alone = G.rotate(x[row : row + 1], angle[row, 0].cos(), angle[row, 0].sin())
        torch.testing.assert_close(found[row : row + 1], alone)
    assert G.rotate(x.float(), angle.float().cos(), angle.float().sin()).dtype == torch.float32
    assert found.dtype == torch.float64
    part = x[:1, :1].requires_grad_()
    turns = [turn(angle[:1]).requires_grad_() for turn in (torch.cos, torch.sin)]
    assert torch.autograd.gradcheck(G.rotate, (part, *turns))


def test_products_of_rotated_vectors_depend_on_their_distance():
    model, tokens = make(), draw(2, 6)
    expected = model(tokens)
    shifted = model(tokens, positions=torch.arange(6) + 20)
    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-4)
    stretched = model(tokens, positions=2 * torch.arange(6))
    assert (stretched - expected).abs().max() > 0.1


def test_a_scaled_frequency_is_kept_slowed_down_or_in_between():
    sizes = replace(TINY, d_k=64, scaling=G.Scaling(8.0, 1.0, 4.0, 256))
    before = G.frequencies(replace(sizes, scaling=None))
    ratio = G.frequencies(sizes) / before
    rotations = 256 * before / (2 * math.pi)
    assert (ratio[rotations > 4] == 1).all()
    torch.testing.assert_close(ratio[rotations < 1], torch.full_like(ratio[rotations < 1], 1 / 8))
    between = ratio[(rotations > 1) & (rotations < 4)]
    assert len(between) and ((between > 1 / 8) & (between < 1)).all()


def test_no_logit_has_a_derivative_with_respect_to_later_tokens():
    model = make()
    x = model.embedding(draw(1, 8)).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: x)
    logits = model(draw(1, 8))
    for t in range(8):
        (gradient,) = torch.autograd.grad(logits[0, t].sin().sum(), x, retain_graph=True)
        assert (gradient[0, t + 1 :] == 0).all()
        assert (gradient[0, : t + 1].abs().amax(dim=1) > 0).all()


def test_grouped_heads_are_repeated_ones():
    grouped, all_heads = make(), make(num_kv_heads=4)
    weights = grouped.state_dict()
    for name, W in weights.items():
        if "W_k" in name or "W_v" in name:  # one head of keys serves the queries of two
            weights[name] = W.view(2, 4, 8).repeat_interleave(2, dim=0).flatten(0, 1)
    all_heads.load_state_dict(weights)
    torch.testing.assert_close(grouped(draw(2, 9)), all_heads(draw(2, 9)), rtol=0, atol=1e-12)


def head_by_head(attention, x, positions, mask):
    """Compute the output of each head of queries alone, by the formula of chapter 3."""
    frequency = G.frequencies(TINY)
    angle = positions.unsqueeze(1).double() * frequency
    outputs = []
    for head in range(TINY.num_heads):
        rows = slice(head * TINY.d_k, (head + 1) * TINY.d_k)
        shared = head // (TINY.num_heads // TINY.num_kv_heads)
        its_keys = slice(shared * TINY.d_k, (shared + 1) * TINY.d_k)
        Q = x @ attention.W_q.weight[rows].T
        K = x @ attention.W_k.weight[its_keys].T
        V = x @ attention.W_v.weight[its_keys].T
        Q, K = (turn_plainly(each, angle) for each in (Q, K))
        scores = Q @ K.transpose(-2, -1) / math.sqrt(TINY.d_k)
        outputs.append(scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ V)
    return torch.cat(outputs, dim=-1) @ attention.W_o.weight.T


def turn_plainly(x, angle):
    numbers = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((numbers.real, numbers.imag), dim=-1)


def test_attention_is_that_of_each_head_alone():
    attention, x = make().layers[0].attention, torch.randn(3, 6, 8).double()
    positions = torch.arange(6)
    angle = positions.unsqueeze(1).double() * G.frequencies(TINY)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    found = attention(x, angle.cos(), angle.sin(), None)
    expected = head_by_head(attention, x, positions, causal)
    torch.testing.assert_close(found, expected)
    parameters = [*attention.parameters()]
    gradients, others = (
        torch.autograd.grad(each.sin().sum(), parameters) for each in (found, expected)
    )
    torch.testing.assert_close(gradients, others)
    attention.eval()
    found = attention(x[:, :2], angle[:2].cos(), angle[:2].sin(), None)
    torch.testing.assert_close(found, expected[:, :2])
    hidden = causal & (torch.rand(3, 1, 6, 6) < 0.7) | torch.eye(6, dtype=torch.bool)
    found = attention(x, angle.cos(), angle.sin(), hidden)
    torch.testing.assert_close(found, head_by_head(attention, x, positions, hidden[:, 0]))


def test_the_last_token_alone_attends_to_all_and_none_makes_nan():
    attention, x = make().layers[0].attention, torch.randn(2, 6, 8).double()
    angle = torch.arange(6).unsqueeze(1).double() * G.frequencies(TINY)
    whole = attention(x, angle.cos(), angle.sin(), None)
    with Cache(attention):
        attention(x[:, :5], angle[:5].cos(), angle[:5].sin(), None)
        last = attention(x[:, 5:], angle.cos(), angle.sin(), None)
    torch.testing.assert_close(last, whole[:, 5:])
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    mask[0, 0, 0] = False
    found = attention(x, angle.cos(), angle.sin(), mask)
    assert (found[0, 0] == 0).all()
    torch.testing.assert_close(found[1], whole[1])


def test_as_many_rows_as_heads_keep_masks_of_their_own():
    model, tokens = make(), draw(4, 6)
    real = torch.arange(6) >= torch.arange(4).unsqueeze(1)  # padding of 0, 1, 2 and 3 tokens
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    found = model(tokens, positions, real.unsqueeze(1))
    for n in range(4):
        alone = model(tokens[n : n + 1, n:])[0]
        torch.testing.assert_close(found[n, n:], alone, rtol=0, atol=1e-12)
    found = model(tokens[:3], positions[:3], real[:3].unsqueeze(1))
    assert found.shape == (3, 6, TINY.vocab_size)


def test_the_feed_forward_network_of_one_number_is_the_example_of_the_chapter():
    network = G.FeedForward(replace(TINY, d_model=1, d_ff=1))
    for W, weight in ((network.W_gate, 1.0), (network.W_up, 1.5), (network.W_down, 0.5)):
        nn.init.constant_(W.weight, weight)
    assert network(torch.tensor([2.0])).item() == pytest.approx(2.642, abs=1e-3)


def test_the_feed_forward_network_is_the_formula():
    network, x = make().layers[0].feed_forward, torch.tensor([[1.0, -2, 0, 3, -1, 0.5, 2, -3]])
    gate, up, down = (
        W.weight.detach().numpy() for W in (network.W_gate, network.W_up, network.W_down)
    )
    through = gate @ x[0].numpy()
    expected = down @ (through / (1 + np.exp(-through)) * (up @ x[0].numpy()))
    np.testing.assert_allclose(network(x.double())[0].detach().numpy(), expected)
    x = torch.randn(2, 3, 8).double().requires_grad_()
    assert network(x).shape == (2, 3, 8)
    assert torch.autograd.gradcheck(network, x)
    for W in (network.W_gate, network.W_up, network.W_down):
        (gradient,) = torch.autograd.grad(network(x).sin().sum(), W.weight)
        assert gradient.abs().min() > 0
    assert network.float()(x.float()).dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_knowing_nothing(tied):
    torch.manual_seed(0)
    model = G.GPT(G.Sizes(1024, 128, 4, 4, 2, 32, 352, 256, tied))
    tokens = torch.randint(1024, (4, 257))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(1024), abs=0.05)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_cache_changes_no_logit(qk_norm):
    model, tokens = make(qk_norm=qk_norm), draw(2, 9)
    expected = model(tokens)
    parts = []
    with Cache(model) as cache:
        for part in tokens.split([4, 1, 3, 1], dim=1):
            positions = torch.arange(cache.length + part.shape[1])
            parts.append(model(part, positions))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


def test_padding_on_the_left_changes_nothing():
    model, tokens = make(), draw(1, 6)
    expected = model(tokens)
    padded = F.pad(tokens, (3, 0), value=5)
    real = torch.arange(9) >= 3
    positions = (torch.arange(9) - 3).clamp(min=0).unsqueeze(0)
    found = model(padded, positions, real.view(1, 1, 9))[:, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (model(padded)[:, 3:] - expected).abs().max() > 0.1


def test_a_mask_of_documents_keeps_them_apart():
    model, tokens = make(), draw(1, 7)
    number = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    same = number.unsqueeze(1) == number.unsqueeze(2)
    found = model(tokens, mask=same)
    torch.testing.assert_close(found[:, 3:], model(tokens[:, 3:]), rtol=0, atol=1e-4)


# The format


@pytest.fixture(params=FOLDERS)
def folder(request):
    return MODELS / request.param


def test_a_saved_folder_is_the_one_that_transformers_writes(folder, tmp_path):
    model, published = G.open_model(folder)
    G.save_model(tmp_path, model, published)
    ours, theirs = (
        safetensors.torch.load_file(at / "model.safetensors") for at in (tmp_path, folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((at / "config.json").read_bytes()) for at in (tmp_path, folder))
    common = ours.keys() & theirs.keys()
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}
    # Versions before 5 look for the first, and Qwens take the others for granted.
    assert ours.keys() - common <= {"rope_theta", "attention_bias", "mlp_bias"}
    ours, theirs = (json.loads((at / "tokenizer.json").read_bytes()) for at in (tmp_path, folder))
    assert ours == theirs
    again, texts = G.open_model(tmp_path)
    assert again.sizes == model.sizes
    assert (texts.mark, texts.ends, texts.names) == (
        published.mark, published.ends, published.names
    )  # fmt: skip
    assert torch.equal(again(draw(1, 5)), model(draw(1, 5)))
    assert (again.to_logits.weight is again.embedding.weight) == model.sizes.tied


def test_what_belongs_to_a_talk_is_saved_too(tmp_path):
    model, published = G.open_model(MODELS / "llama")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    texts = replace(published, ends=frozenset({0, 5}), template=template)
    G.save_model(tmp_path, model, texts)
    _, again = G.open_model(tmp_path)
    assert (again.ends, again.template) == ({0, 5}, template)


def test_what_config_json_can_not_tell_is_not_saved(tmp_path):
    model, published = G.open_model(MODELS / "llama")
    model.sizes = replace(model.sizes, factors=(1.0,) * (model.sizes.d_k // 2))
    with pytest.raises(OSError, match=r"config\.json can't say that"):
        G.save_model(tmp_path / "model", model, published)
    assert not (tmp_path / "model").exists()


def test_a_mark_typed_by_a_person_is_text(folder):
    _, published = G.open_model(folder)
    tokenizer = published.tokenizer
    ids = tokenizer.encode("<|endoftext|></s>").ids
    assert MARK_ID not in ids
    assert tokenizer.decode(ids) == "<|endoftext|></s>"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_bytes())
    config = {name: x for name, x in (config | changes).items() if x is not None}
    (folder / "config.json").write_text(json.dumps(config))


def spoil_weights(folder, change):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def put_nan(weights):
    weights["model.norm.weight"][1] = math.nan


BROKEN = {
    "no folder": (shutil.rmtree, "config.json: there is no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no such file"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "there is no such file"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type":'), "Expecting"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "no JSON object"),
    "no size": (lambda f: change_config(f, hidden_size=None), "it lacks hidden_size"),
    "a word": (lambda f: change_config(f, hidden_size="8"), "d_model is '8'"),
    "a terabyte": (lambda f: change_config(f, hidden_size=1 << 15), "other sizes"),
    "more": (lambda f: change_config(f, num_hidden_layers=10**9), "num_layers is 1000000000"),
    "heads": (lambda f: change_config(f, num_key_value_heads=3), "3 heads of keys"),
    "odd": (lambda f: change_config(f, head_dim=3), "d_k 3 is not even"),
    "other shapes": (lambda f: change_config(f, intermediate_size=17), "other sizes"),
    "another network": (lambda f: change_config(f, model_type="gpt2"), "model_type is 'gpt2'"),
    "biases": (lambda f: change_config(f, attention_bias=True), "attention_bias is True"),
    "scaled": (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "no base": (lambda f: change_config(f, rope_theta=0), "theta is 0"),
    "half": (lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0"), "broken, or"),
    "NaN": (lambda f: spoil_weights(f, put_nan), "not finite"),
    "a tensor less": (lambda f: spoil_weights(f, lambda w: w.popitem()), "other sizes"),
    "no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "Expecting property name"),
    "more tokens": (
        lambda f: (f / "tokenizer.json").write_text(learn_tokenizer([TEXT], 268).to_str()),
        "more tokens than the network",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_or_foreign_folder_is_refused_in_a_line(kind, tmp_path):
    folder = shutil.copytree(MODELS / "llama", tmp_path / "model")
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(OSError, match=message) as error:
        G.open_model(folder)
    assert str(error.value).startswith(f"not a language model that this script can open: {folder}")
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path):
    model, published = G.open_model(MODELS / "llama")
    G.save_model(tmp_path, model, published)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(OSError, match="checksum"):
        G.open_model(tmp_path)


# Beside transformers, where it is installed


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_what_was_saved(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = draw_weights(G.GPT(replace(TINY, tied=tied)))
    tokenizer = learn_tokenizer([TEXT], TINY.vocab_size)
    G.save_model(tmp_path, model, own_texts(tokenizer))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    tokens = draw(2, 10)
    assert_close(theirs(tokens).logits, model(tokens))
    tokenize = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT + "\tür 12\r\n  日本 🎉\0 x_y  \n"
    assert tokenize(text).input_ids == tokenizer.encode(text).ids
    assert tokenize.decode(tokenize(text).input_ids) == text
    assert tokenize.eos_token_id == theirs.config.eos_token_id == MARK_ID
    written = theirs.generate(tokens[:1], max_new_tokens=20, do_sample=False)[0, 10:].tolist()
    prompt = tokens[0].tolist()
    columns = G.next_tokens(model, [prompt], G.Sampling(0), [0], context=30, end=MARK_ID)
    assert [token for (token,) in columns] == [token for token in written if token != MARK_ID]


# Training, writing, and measuring


SETTINGS = G.Settings(
    d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=16, context=16, vocab_size=300,
    steps=10, interval=2, batch_size=2, warmup=2,
)  # fmt: skip
OPTIONS = (
    "--d-model", 16, "--num-layers", 1, "--num-heads", 2, "--num-kv-heads", 1, "--d-ff", 16,
    "--context", 64, "--vocab-size", 300, "--steps", 6, "--interval", 2, "--batch-size", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of small .py files."""
    folder = tmp_path_factory.mktemp("data")
    for n in range(40):
        text = TEXT.replace("add", f"add{n}") + f"x = 'für {n}'\n"
        (folder / f"file{n}.py").write_text(text, encoding="utf-8")
    return folder


def encode(data, folder, texts=None):
    """Encode the files of a folder for a published network, or anew."""
    text = G.Text(data, G.PYTHON)
    if texts is None:
        folder = G.prepare_documents(text, SETTINGS.vocab_size, folder)
    else:
        folder = G.prepare_documents(text, 264, folder, texts.tokenizer, texts.mark)
    corpus, tokenizer = G.open_corpus(folder)
    return texts or own_texts(tokenizer), corpus


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """What belongs to the texts of that folder, and its tokens."""
    return encode(data, tmp_path_factory.mktemp("corpus"))


def start(out, prepared, seed=0, settings=SETTINGS, model=None):
    texts, corpus = prepared
    out.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    published = model is not None
    model = model or G.GPT(settings.sizes(texts.tokenizer.get_vocab_size()))
    fixed = G.identify(model, published, corpus, settings)
    return G.make_run(out, model, fixed, settings, seed)


def train(run, prepared, settings=SETTINGS):
    texts, corpus = prepared
    return [row[:3] for row in G.train(run, corpus, texts, settings)]


def test_each_token_of_a_window_predicts_the_next():
    model = make()
    for B, T in ((1, 1), (3, 5)):
        windows = draw(B, T + 1)
        costs = []
        for b in range(B):
            for t in range(T):
                log_p = model(windows[b : b + 1, : t + 1])[0, -1].log_softmax(dim=-1)
                costs.append(-log_p[windows[b, t + 1]])
        expected = torch.stack(costs).mean()
        loss = G.next_token_loss(model, windows)
        torch.testing.assert_close(loss, expected)
        found, gradients = (torch.autograd.grad(x, [*model.parameters()]) for x in (loss, expected))
        torch.testing.assert_close(found, gradients)


def test_the_loss_stays_on_the_device_of_the_network():
    model = G.GPT(TINY).to("meta")
    loss = G.next_token_loss(model, draw(3, 6).to("meta"))
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())


def test_a_step_learns_from_its_own_windows(tmp_path, prepared, monkeypatch):
    _, corpus = prepared
    seen = []
    loss_of = G.next_token_loss

    def watched(model, windows):
        seen.append(windows)
        return loss_of(model, windows)

    monkeypatch.setattr(G, "next_token_loss", watched)
    run = start(tmp_path / "out", prepared)
    train(run, prepared)
    order = G.Windows(len(corpus.tokens), SETTINGS.context + 1, run.seed)
    starts = order.draw(0, SETTINGS.steps * SETTINGS.batch_size)
    expected = [corpus.tokens[i : i + SETTINGS.context + 1].long() for i in starts]
    assert torch.equal(torch.cat(seen), torch.stack(expected))


@pytest.mark.parametrize("stop_at", [1, 6])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, prepared, monkeypatch, stop_at):
    expected = start(tmp_path / "whole", prepared)
    rows = train(expected, prepared)
    run = start(tmp_path / "stopped", prepared)
    add = run.add

    def add_and_stop(loss, count):
        add(loss, count)
        if run.progress.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run, "add", add_and_stop)
    with pytest.raises(Stopped):
        train(run, prepared)
    run = start(tmp_path / "stopped", prepared)
    run.resume()
    assert run.progress.step == stop_at + 1
    train(run, prepared)
    assert [row[:3] for row in run.progress.rows] == rows
    weights, others = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("whole", "stopped")
    )
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    for optimizer, other in zip(run.optimizers, expected.optimizers, strict=True):
        states = optimizer.state_dict()["state"], other.state_dict()["state"]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_it_learns_and_the_validation_is_that_of_the_saved_network(tmp_path, prepared):
    settings = replace(SETTINGS, steps=60, batch_size=8)
    run = start(tmp_path / "out", prepared, settings=settings)
    rows = train(run, prepared, settings)
    first = math.log(run.model.sizes.vocab_size)
    assert rows[0][1] < first
    assert rows[-1][2] < 0.7 * first
    model, _ = G.open_model(tmp_path / "out")
    bits = G.measure_bits(model, prepared[1].held_out)
    assert bits.mean().item() * math.log(2) == pytest.approx(rows[-1][2])


def test_a_run_is_cut_at_each_validation():
    settings = replace(SETTINGS, steps=10, interval=4)
    assert [list(G.steps_of(4 * n, n, settings)) for n in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_a_run_whose_text_has_changed_is_not_resumed(run_script, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.md").write_text(f"{n}\n{TEXT}", encoding="utf-8")
    (folder / "no.md").write_bytes(b"\xff")
    options = ("--data", folder, "--glob", "*.md", *OPTIONS)
    done = run_script("gpt.py", *options)
    assert (done.returncode, done.stderr.count("left out: 1 files that are not text")) == (0, 1)
    checkpoint = (tmp_path / "runs" / "gpt" / "checkpoint.pt").read_bytes()
    (folder / "1.md").touch()
    assert run_script("gpt.py", *options, "--resume").returncode == 0
    (folder / "1.md").write_text("changed", encoding="utf-8")
    refused = run_script("gpt.py", *options, "--resume")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "belongs to another run: text was" in refused.stderr
    assert (tmp_path / "runs" / "gpt" / "checkpoint.pt").read_bytes() == checkpoint


def test_a_loss_that_is_no_number_is_not_saved(tmp_path, prepared):
    run = start(tmp_path / "out", prepared)
    nn.init.constant_(run.model.norm.weight, math.nan)
    with pytest.raises(FloatingPointError, match="validation loss became nan"):
        G.validate(run, prepared[1], prepared[0])
    assert list((tmp_path / "out").iterdir()) == []


def test_the_rates_rise_stay_and_fall():
    settings = replace(SETTINGS, steps=100, warmup=10, falling=0.5)
    optimizers = G.make_optimizers(G.GPT(TINY), settings)
    rates = []
    for step in range(100):
        G.set_rates(optimizers, step, settings)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
    share = np.array(rates) / [settings.matrix_rate, settings.learning_rate]
    expected = [min(1, (n + 1) / 10, (100 - n) / 50) for n in range(100)]
    np.testing.assert_allclose(share, np.outer(expected, [1, 1]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_each_weight_has_one_optimizer_and_matrices_of_layers_have_muon(muon, tied):
    model = G.GPT(replace(TINY, tied=tied))
    optimizers = G.make_optimizers(model, replace(SETTINGS, muon=muon))
    groups = [{id(p) for p in o.param_groups[0]["params"]} for o in optimizers]
    assert groups[0] == {id(p) for p in model.layers.parameters() if p.dim() == 2}
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert isinstance(optimizers[0], torch.optim.Muon if muon else torch.optim.AdamW)


def test_bits_are_those_of_each_token_in_windows_that_do_not_overlap():
    model = draw_weights(G.GPT(TINY))
    documents = [F.pad(draw(n), (1, 0), value=MARK_ID) for n in (150, 1, 0, 64)]
    found = G.measure_bits(model, documents)
    expected = []
    for ids in documents:
        for t in range(1, len(ids)):
            begin = (t - 1) // 64 * 64
            log_p = model(ids[None, begin:t])[0, -1].log_softmax(dim=-1)
            expected.append(-log_p[ids[t]].item() / math.log(2))
    assert len(found) == 150 + 1 + 64
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    apart = torch.cat([G.measure_bits(model, [ids]) for ids in documents])
    torch.testing.assert_close(found, apart, rtol=1e-5, atol=0)
    many = G.measure_bits(model, documents * 40)  # more windows than fit at once
    torch.testing.assert_close(many, found.repeat(40), rtol=1e-5, atol=0)


def test_a_token_with_probability_a_quarter_costs_two_bits():
    model = G.GPT(replace(TINY, context=4))
    logits = torch.full((264,), -100.0)
    logits[:4] = 0.0
    model.to_logits.register_forward_hook(lambda _, x, y: logits.expand_as(y))
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    model.embedding.register_forward_hook(lambda *_: modes.append(model.training))
    found = G.measure_bits(model.train(), [torch.tensor([0, 3, 1, 2, 2, 1, 0])])
    assert found.tolist() == pytest.approx([2.0] * 6)
    assert found.dtype == torch.float64
    assert not any(modes)
    assert not found.requires_grad


def test_compressors_are_measured_alone_and_given_another_text():
    text, given = b"abc" * 50 + b"xyz", bytes(range(256))
    found = G.compress(text, given)
    assert found["bz2 -9"] == 8 * len(bz2.compress(text, 9)) / 153
    preset = 9 | lzma.PRESET_EXTREME
    more = len(lzma.compress(given + text, preset=preset)) - len(
        lzma.compress(given, preset=preset)
    )
    assert found["xz -9e, given the training files"] == 8 * more / 153
    assert len(found) == 4
    assert list(G.compress(text)) == ["bz2 -9", "xz -9e"]


def test_a_run_as_a_person_runs_it(run_script, tmp_path, data):
    done = run_script("gpt.py", "--data", data, *OPTIONS)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "gpt"
    metrics = json.loads((out / "metrics.json").read_bytes())
    assert f"{metrics['bits_per_byte']:7.3f}  this network" in done.stdout
    for name, bits in metrics["compressors"].items():
        assert f"{bits:7.3f}  {name}" in done.stdout
    assert len(metrics["samples"]) == 20
    assert len({each["text"] for each in metrics["samples"]}) == 20
    assert done.stdout.count("a sample at temperature 0.8") == 3
    assert len(metrics["epochs"]) == 3
    steps = re.findall(r"^ +(\d+)  .*\d$", done.stdout, re.MULTILINE)
    assert steps == ["2", "4", "6"]
    model, published = G.open_model(out)
    tokenizer = published.tokenizer
    held_out = [path.read_text("utf-8") for path in data.iterdir() if is_held_out(path.name)]
    size = sum(len(text.encode()) for text in held_out)
    ids = [[MARK_ID, *tokenizer.encode(text).ids] for text in held_out]
    bits = G.measure_bits(model, [*map(torch.tensor, ids)])
    assert metrics["held_out_bytes"] == size
    assert metrics["training_bytes"] == metrics["training_bytes_given"]
    assert metrics["bits_per_byte"] == pytest.approx(bits.sum().item() / size)

    def read_files():
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    files = read_files()
    again = run_script("gpt.py", "--data", data, *OPTIONS)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "--resume continues it" in again.stderr
    for prompt in ("def", "<|endoftext|>"):
        written = run_script("gpt.py", "--write", prompt)
        assert (written.returncode, written.stdout[: len(prompt)]) == (0, prompt)
    assert written.stdout == run_script("gpt.py", "--write", prompt).stdout
    assert written.stdout != run_script("gpt.py", "--write", prompt, "--seed", 1).stdout
    cold = [run_script("gpt.py", "--write", "x", *cold).stdout for cold in COLD]
    assert cold[0] == cold[1]
    assert "stopped at 64 tokens" in run_script("gpt.py", "--write", "x", "--seed", 5).stderr
    letter = cold[0][3]
    stopped = run_script("gpt.py", "--write", "x", "--temperature", 0, "--stop", letter)
    assert stopped.stdout == f"x{cold[0][1:].partition(letter)[0]}\n"
    assert read_files() == files

    path = data / "file3.py"
    shown = run_script("gpt.py", "--bits", path)
    lines = shown.stdout.splitlines()
    assert lines[0] == "def add3(a, b):"
    text = path.read_text(encoding="utf-8")
    cost = (
        G.measure_bits(model, [torch.tensor([MARK_ID, *tokenizer.encode(text).ids])]).sum().item()
    )
    assert f"{cost / len(text.encode()):7.3f}  this network" in lines

    for arguments, status, message in bad_inputs(data, text):
        refused = run_script("gpt.py", *arguments)
        assert (refused.returncode, message in refused.stderr) == (status, True), refused.stderr
        assert refused.stderr.splitlines()[-1].count("gpt.py: ") == 1
        assert refused.stdout == ""
    assert read_files() == files


COLD = [("--temperature", 0), ("--top-k", 1, "--seed", 7)]


def bad_inputs(data, text):
    """Yield options, and how they are refused."""
    (data / "latin.txt").write_bytes(b"\xfc")
    (data / "empty.txt").write_bytes(b"")
    (data / "no documents").mkdir()
    yield ["--write", ""], 2, "argument --write: must not be empty"
    yield ["--write", "\udcfc"], 2, "argument --write: must be UTF-8"
    yield ["--write", text * 9], 1, "tokens; at most 62 fit"
    yield ["--write", "x", "--out", data], 1, "config.json: there is no such file"
    yield ["--write", "x", "--top-p", 0], 2, "--top-p: must be between"
    yield ["--bits", data / "latin.txt"], 1, "latin.txt is not UTF-8"
    yield ["--bits", data / "empty.txt"], 1, "empty.txt is empty"
    yield ["--bits", data / "missing.txt"], 1, "No such file"
    yield ["--bits", data], 1, "is not a plain file"
    yield ["--bits", data / "latin.txt", "--stop", "x"], 2, "argument --stop: needs --write"
    yield ["--write", "x", "--force"], 2, "argument --force: needs --zip or --unzip"
    yield ["--data", data / "nowhere"], 2, "argument --data: must be a folder"
    yield ["--data", data / "no documents", "--restart"], 1, "(*.py) has no text"
    yield ["--glob", "*.md"], 2, "argument --glob: needs a folder in --data"
    yield ["--data", data / "file3.py", "--glob", "*"], 2, "argument --glob: needs a folder"
    yield ["--data", data, "--glob", "*.md", "--restart"], 1, "(*.md) has no text to train on"
    yield ["--data", data, "--context", 100_000, "--restart"], 1, "too few for a context"
    yield ["--d-model", 18, "--num-heads", 4], 2, "--d-model: must be divisible"
    yield ["--num-heads", 4, "--num-kv-heads", 3], 2, "--num-heads: must be divisible"


@pytest.mark.gpu
def test_it_computes_the_same_on_an_accelerator():
    model, tokens = make(qk_norm=True, qkv_bias=True).float(), draw(3, 20)
    mask = torch.rand(3, 20, 20) < 0.7
    mask |= torch.eye(20, dtype=torch.bool)
    expected = [model(tokens), model(tokens, mask=mask)]
    device = torch.accelerator.current_accelerator()
    model.to(device)
    found = [model(tokens.to(device)), model(tokens.to(device), mask=mask.to(device))]
    for logits, others in zip(found, expected, strict=True):
        torch.testing.assert_close(logits.cpu(), others, rtol=1e-3, atol=1e-3)
