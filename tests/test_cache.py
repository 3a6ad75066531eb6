import pytest
import torch
import torch.nn.functional as F

import transformer as T
from attention import padding_mask
from conftest import draw, make
from decoding.cache import cached


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_cache_changes_no_logit(norm_first):
    model = make(norm_first=norm_first)
    source, target = draw([5, 3]), draw([6, 6])
    memory, mask = model.encode(source), padding_mask(source, T.PAD)
    parts, start = [], 0
    with cached(model) as rows:
        for part in target.split([1, 3, 2], dim=1):
            parts.append(model.decode(part, memory if start == 0 else memory[:, :0], mask, start))
            start += part.shape[1]
        assert {kept.shape[1] for kept in rows.values()} == {5, 6}
    expected = model(source, target)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


def test_the_cache_leaves_nothing_behind():
    model = make()
    source, target = draw([5, 3]), draw([6, 6])
    expected = model(source, target)
    with pytest.raises(ValueError), cached(model):
        model(source, F.pad(target, (0, T.MAX_LENGTH)))
    torch.testing.assert_close(model(source, target), expected)
