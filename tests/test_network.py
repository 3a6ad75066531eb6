"""The network of real work: settings, pre-norm, and its file."""

import copy
import dataclasses
import json
import math
import os

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import network as N
from attention import causal_mask
from conftest import SMALL, draw, make
from transformer import PAD, Sizes, Transformer


class PyTorchs(nn.Module):
    """PyTorch's own Transformer, norm first, with the weights of ours."""

    def __init__(self, ours):
        super().__init__()
        self.embedding, self.positions = copy.deepcopy(ours.embedding), ours.positions
        layer, d_model = ours.encoder[0], ours.embedding.embedding_dim
        self.layers = nn.Transformer(
            d_model, layer.self_attention.num_heads, len(ours.encoder), len(ours.decoder),
            layer.feed_forward[0].out_features, dropout=0.0, batch_first=True, norm_first=True,
            dtype=torch.float64,
        )  # fmt: skip
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)  # the biases of attention, which ours has not, stay so
        self.attention = []  # ours, and PyTorch's
        for layer, other in zip(
            [*ours.encoder, *ours.decoder],
            [*self.layers.encoder.layers, *self.layers.decoder.layers],
            strict=True,
        ):
            self.attention.append((layer.self_attention, other.self_attn))
            if hasattr(layer, "cross_attention"):
                self.attention.append((layer.cross_attention, other.multihead_attn))
                other.norm3.load_state_dict(layer.norm3.state_dict())
            other.linear1.load_state_dict(layer.feed_forward[0].state_dict())
            other.linear2.load_state_dict(layer.feed_forward[2].state_dict())
            other.norm1.load_state_dict(layer.norm1.state_dict())
            other.norm2.load_state_dict(layer.norm2.state_dict())
        for mine, other in self.attention:
            weights = [W.weight for W in (mine.W_q, mine.W_k, mine.W_v)]
            other.in_proj_weight.data.copy_(torch.cat(weights))
            other.out_proj.load_state_dict({"weight": mine.W_o.weight}, strict=False)
        self.layers.encoder.norm.load_state_dict(ours.encoder_norm.state_dict())
        self.layers.decoder.norm.load_state_dict(ours.decoder_norm.state_dict())

    def embed(self, tokens):
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        return x + self.positions[: tokens.shape[1]]

    def forward(self, source, target):
        # Its masks are True where nothing may be attended to.
        x = self.layers(
            self.embed(source), self.embed(target),
            tgt_mask=~causal_mask(target.shape[1]), src_key_padding_mask=source == PAD,
            tgt_key_padding_mask=target == PAD, memory_key_padding_mask=source == PAD,
        )  # fmt: skip
        return x @ self.embedding.weight.T


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_of_pre_norm_are_those_of_pytorch():
    ours = make()
    theirs = PyTorchs(ours)
    source, target = draw([7, 4, 1]), draw([3, 6, 5])
    real = target != PAD
    logits, expected = (model(source, target)[real] for model in (ours, theirs))
    torch.testing.assert_close(logits, expected)
    for values in (logits, expected):
        values.sin().sum().backward()
    compared = 0
    for mine, other in theirs.attention:
        weights = [W.weight.grad for W in (mine.W_q, mine.W_k, mine.W_v)]
        torch.testing.assert_close(torch.cat(weights), other.in_proj_weight.grad)
        torch.testing.assert_close(mine.W_o.weight.grad, other.out_proj.weight.grad)
        compared += 4
    layers = [*theirs.layers.encoder.layers, *theirs.layers.decoder.layers]
    for layer, other in zip([*ours.encoder, *ours.decoder], layers, strict=True):
        pairs = [(layer.norm1, other.norm1), (layer.norm2, other.norm2)]
        pairs += [(layer.feed_forward[0], other.linear1), (layer.feed_forward[2], other.linear2)]
        pairs += [(layer.norm3, other.norm3)] if hasattr(layer, "norm3") else []
        for mine, its in pairs:
            torch.testing.assert_close(mine.weight.grad, its.weight.grad)
            torch.testing.assert_close(mine.bias.grad, its.bias.grad)
            compared += 2
    for mine, its in (
        (ours.encoder_norm, theirs.layers.encoder.norm),
        (ours.decoder_norm, theirs.layers.decoder.norm),
    ):
        torch.testing.assert_close(mine.weight.grad, its.weight.grad)
        torch.testing.assert_close(mine.bias.grad, its.bias.grad)
        compared += 2
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)
    assert compared + 1 == len(list(ours.parameters()))
    assert all(p.grad.abs().max() > 1e-6 for p in ours.parameters())


def test_the_future_changes_nothing():
    model = make()
    source, target = draw([5, 3]), draw([6, 6])
    changed = torch.cat((target[:, :4], 22 - target[:, 4:]), dim=1)
    outputs = [model(source, tokens) for tokens in (target, changed)]
    torch.testing.assert_close(outputs[0][:, :4], outputs[1][:, :4], rtol=0, atol=1e-12)
    assert not torch.isclose(outputs[0][:, 4:], outputs[1][:, 4:]).all(dim=-1).any()


def test_padding_changes_nothing():
    model = make()
    source, target = draw([5, 3]), draw([6, 4])
    expected = model(source, target)
    wider = model(F.pad(source, (0, 3)), F.pad(target, (0, 2)))
    torch.testing.assert_close(wider[:, :6], expected, rtol=0, atol=1e-12)
    alone = model(source[1:, :3], target[1:, :4])
    torch.testing.assert_close(alone, expected[1:, :4], rtol=0, atol=1e-12)


def test_a_pre_norm_layer_that_drops_its_sublayers_changes_nothing():
    torch.manual_seed(0)
    sizes, x, mask = Sizes(16, 2, 1, 24, dropout=1.0), torch.randn(2, 5, 16), causal_mask(5)
    encoder, decoder = N.PreNormEncoderLayer(sizes), N.PreNormDecoderLayer(sizes)
    assert torch.equal(encoder(x, mask), x)
    assert torch.equal(decoder(x, mask, x, mask), x)
    assert not torch.allclose(encoder.eval()(x, mask), x)
    assert not torch.allclose(decoder.eval()(x, mask, x, mask), x)


def test_dropout_is_for_training_only():
    model = make(dropout=0.5)
    source, target = draw([4]), draw([3])
    assert not torch.equal(model(source, target), model(source, target))
    model.eval()
    assert torch.equal(model(source, target), model(source, target))


def test_the_settings_choose_the_network(words):
    pre, post = (
        N.make_model(dataclasses.replace(SMALL, norm_first=first), words) for first in (True, False)
    )
    assert (type(pre), type(post)) == (N.PreNormTransformer, Transformer)
    counts = [sum(p.numel() for p in model.parameters()) for model in (pre, post)]
    assert counts[0] == counts[1] + 2 * 2 * SMALL.d_model
    assert pre.embedding.num_embeddings == words.get_vocab_size()
    assert pre.encoder[0].feed_forward[0].out_features == SMALL.d_ff
    assert pre.decoder[0].cross_attention.num_heads == SMALL.num_heads
    assert len(pre.encoder) == len(pre.decoder) == SMALL.num_layers


def test_presets_are_those_of_the_paper_and_of_the_text():
    base = N.PRESETS["base"]
    assert (base.d_model, base.num_heads, base.num_layers, base.d_ff) == (512, 8, 6, 2048)
    assert (base.dropout, base.warmup, base.vocab_size) == (0.1, 4000, 37_000)
    assert (base.norm_first, base.batch_tokens, base.average) == (False, 50_000, 5)
    assert N.PRESETS["small"] == N.Settings()


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"dropout": math.nan}, {"d_model": 10}])
def test_a_setting_out_of_range_is_refused_by_its_option(changes):
    with pytest.raises(ValueError, match="--" + next(iter(changes)).replace("_", "-")):
        N.Settings(**changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, words):
    """A network that was not trained, in its file."""
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    torch.manual_seed(0)
    N.save_model(path, N.make_model(SMALL, words), words, SMALL)
    return path


def test_a_saved_model_is_the_same_when_opened(saved, words):
    model, tokenizer = N.open_model(saved)
    torch.manual_seed(0)
    expected = N.make_model(SMALL, words)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert tokenizer.encode("<s> hund").ids == words.encode("<s> hund").ids
    source, target = draw([4, 2]), draw([3, 3])
    assert torch.equal(model(source, target), expected(source, target))


def with_settings(**changes):
    def spoil(content):
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header["settings"] = json.dumps(json.loads(header["settings"]) | changes)
        return safetensors.torch.save(safetensors.torch.load(content), header)

    return spoil


def with_a_nan(content):
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    weights = safetensors.torch.load(content)
    weights["decoder_norm.bias"][3] = math.nan
    return safetensors.torch.save(weights, header)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "No such file"),
        (lambda content: b"", ""),
        (lambda content: b"a text", ""),
        (lambda content: content[:-1], ""),
        (lambda content: content[:100], ""),
        (lambda content: safetensors.torch.save(safetensors.torch.load(content)), ""),
        (with_settings(d_ff=16), "other sizes"),
        (with_settings(num_layers=48), ""),
        (with_settings(num_layers=10**9), "--num-layers: must be between 1 and 48"),
        (with_settings(d_model="16"), ""),
        (with_settings(kernel=3), ""),
        (with_a_nan, "not finite"),
    ],
    ids=range(12),
)
def test_a_model_that_is_none_is_refused_with_a_reason(saved, tmp_path, spoil, message):
    path = tmp_path / "model.safetensors"
    if spoil:
        path.write_bytes(spoil(saved.read_bytes()))
    with pytest.raises(OSError, match="no model saved by this script, train one first") as caught:
        N.open_model(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    N.write(path, b"old")
    assert path.read_bytes() == b"old"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"file.*No space left"):
        N.write(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
