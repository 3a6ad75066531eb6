import pytest
import torch
import torch.nn.functional as F
from torch import nn

import transformer as T
from attention import causal_mask, padding_mask
from conftest import ROOT, draw, make
from decoding.cache import Cache


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_cache_changes_no_logit(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([14, 14])
    memory, mask = model.encode(source), padding_mask(source, T.PAD)
    parts = []
    with Cache(model, memory) as cache, torch.device("meta"):  # that of tensors that name none
        for part in target.split([1, 9, 4], dim=1):
            parts.append(model.decode(part, memory, mask, cache.length))
        assert cache.length == 14
    expected = model(source, target)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


def test_each_token_and_the_memory_are_projected_once():
    model, widths = make(), {"self_attention": [], "cross_attention": []}
    for name, seen in widths.items():
        W_k = model.get_submodule(f"decoder.1.{name}.W_k")
        # Behind the cache's hook, which cuts off what is there already.
        W_k.register_forward_hook(lambda W, x, _, seen=seen: seen.append(x[0].shape[1]))
    source, target = draw([5, 3]), draw([4, 4])
    memory, mask = model.encode(source), padding_mask(source, T.PAD)
    with Cache(model, memory) as cache:
        for part in target.split(1, dim=1):
            model.decode(part, memory, mask, cache.length)
    assert widths == {"self_attention": [1] * 4, "cross_attention": [5, 0, 0, 0]}


def test_reordered_rows_continue_what_others_began():
    model, source = make(), draw([5]).expand(3, -1)
    memory, mask = model.encode(source), padding_mask(source, T.PAD)
    begun, new, rows = draw([2, 2, 2]), draw([1, 1, 1]), torch.tensor([2, 2, 0])
    with Cache(model, memory) as cache:
        model.decode(begun, memory, mask)
        cache.reorder(rows)
        found = model.decode(new, memory, mask, cache.length)[:, -1]
    expected = model.decode(torch.cat((begun[rows], new), dim=1), memory, mask)[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Rotating(nn.Module):
    """Grouped attention of a decoder without an encoder, whose keys turn with their positions."""

    def __init__(self):
        super().__init__()
        self.W_q, self.W_k, self.W_v = (nn.Linear(16, n * 4, bias=False) for n in (4, 2, 2))

    def rotate(self, x, start):
        angle = torch.arange(start, start + x.shape[2]).double().unsqueeze(1) * torch.tensor([1, 9])
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    def forward(self, x, start):
        projections = (self.W_q(x), self.W_k(x), self.W_v(x))
        Q, K, V = (each.unflatten(-1, (-1, 4)).transpose(1, 2) for each in projections)
        mask = causal_mask(K.shape[2])[start:]
        Q, K = self.rotate(Q, start), self.rotate(K, 0)
        output = F.scaled_dot_product_attention(Q, K, V, mask, enable_gqa=True)
        return x + output.transpose(1, 2).flatten(2)


def test_keys_of_another_kind_of_attention_may_be_rotated_after_the_cache():
    torch.manual_seed(0)
    layers, x = nn.ModuleList([Rotating(), Rotating()]).double(), torch.randn(2, 6, 16).double()

    def run(x, start=0):
        for layer in layers:
            x = layer(x, start)
        return x

    with Cache(layers) as cache:
        parts = [run(part, cache.length) for part in x.split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), run(x), rtol=0, atol=1e-12)


def test_the_cache_leaves_nothing_behind():
    model = make()
    source, target = draw([5, 3]), draw([6, 6])
    expected = model(source, target)
    with pytest.raises(ValueError), Cache(model):
        model(source, F.pad(target, (0, T.MAX_LENGTH)))
    torch.testing.assert_close(model(source, target), expected)


def test_no_source_asks_whether_a_network_follows_a_protocol():
    """Since Python 3.12, `isinstance` doesn't see the parts of an nn.Module: none would."""
    sources = (ROOT / "src").rglob("*.py")
    assert not [path for path in sources if "runtime_checkable" in path.read_text("utf-8")]
