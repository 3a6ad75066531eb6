"""The network of real work: settings, pre-norm, and its file."""

import dataclasses
import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import network as N
from attention import causal_mask
from conftest import SMALL, assert_equals_pytorch, draw, make
from transformer import Sizes, Transformer


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_values_and_gradients_of_pre_norm_are_those_of_pytorch():
    assert_equals_pytorch(make())


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
    assert base.smoothing == 0.1
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
    with pytest.raises(OSError, match="not a model saved by this script; train") as caught:
        N.open_model(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
