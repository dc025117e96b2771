"""data/cpu.py: what it does in another way than torch must give what torch gives."""

import pytest
import torch
import torch.nn.functional as F

from torch import nn

from data.cpu import Dropout, Linear, packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 65])
def test_a_packed_product_equals_torchs_for_weights_of_every_size(rows, dtype):
    torch.manual_seed(0)
    layer, x = Linear(48, 300), torch.randn(rows, 1, 48)
    layer.weight.data = (torch.randn(300, 48) * 10.0 ** torch.linspace(-7, 4, 300)[:, None]).to(dtype)
    expected = F.linear(x.double(), layer.weight.double())
    scale = x.double().norm(dim=-1, keepdim=True) * layer.weight.double().norm(dim=-1)  # (rows, 1, 300)
    with torch.no_grad():
        plain = layer(x)
        with packed(layer):
            found = layer(x)
    for y in plain, found:
        assert y.shape == expected.shape and y.dtype == torch.float32
    assert ((plain - expected).abs() <= 1e-6 * scale).all()
    lost = 3e-8 * x.double().abs().sum(-1, keepdim=True) if dtype == torch.bfloat16 else 0  # fp16 below 6e-5
    assert ((found - expected).abs() <= 1e-6 * scale + lost).all()


def test_weights_that_fp16_cannot_hold_are_multiplied_all_the_same():
    layer, x = Linear(4, 4), torch.eye(4)
    layer.weight.data = torch.full((4, 4), 1e6).bfloat16()
    with torch.no_grad(), packed(layer):
        assert torch.equal(layer(x), layer.weight.float())


def test_a_layer_is_packed_once_and_only_as_long_as_it_lasts():
    layer, x = Linear(8, 8), torch.randn(3, 8)
    layer.weight.data.normal_()
    with torch.no_grad():
        with packed(layer):
            product = layer.product
            with packed(nn.ModuleList([layer])):
                assert layer.product is product
            assert layer.product is product
        layer.weight.data.zero_()
        assert not layer(x).any()


def test_a_packed_layer_still_has_gradients_and_obeys_autocast():
    layer, x = Linear(8, 8), torch.randn(3, 8)
    layer.weight.data.normal_()
    with packed(layer):
        layer(x).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.weight.grad, x.sum(0).expand(8, 8))


def test_weights_in_float64_keep_their_precision():
    layer, x = Linear(8, 8), torch.randn(3, 8, dtype=torch.double)
    layer.weight.data = torch.randn(8, 8, dtype=torch.double)
    with torch.no_grad(), packed(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_a_product_with_weights_in_half_precision_has_torchs_gradients():
    torch.manual_seed(0)
    layer, x = Linear(48, 20), torch.randn(3, 48, requires_grad=True)
    layer.weight.data = torch.randn(20, 48).bfloat16()
    g = torch.randn(3, 20)
    found = torch.autograd.grad(layer(x), (x, layer.weight), g)
    expected = torch.autograd.grad(F.linear(x, layer.weight.float()), (x, layer.weight), g)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected))


def test_dropout_drops_at_its_rate_independently_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1001, 999, requires_grad=True)
    y = dropout(x)
    dropped = (y == 0).double()
    assert dropped.mean().item() == pytest.approx(0.1, abs=4 * (0.09 / x.numel()) ** 0.5)
    assert y.mean().item() == pytest.approx(1, abs=2e-3) and len(y.unique()) == 2
    for axis in (0, 1):  # a row or a column of drops varies as independent ones do
        assert dropped.mean(axis).std().item() == pytest.approx((0.09 / x.shape[axis]) ** 0.5, rel=0.1)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_does_nothing_in_evaluation_or_at_rate_0():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
