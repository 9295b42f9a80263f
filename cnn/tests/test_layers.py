"""The layers against torch's in float64, and their gradients against finite differences."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import layers
import model

CLOSE = {"rtol": 0.0, "atol": 1e-10}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours, theirs, *inputs: torch.Tensor) -> None:
    """The two functions agree on the inputs, and so do the gradients by all of them."""
    y, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(y, expected, **CLOSE)
    g = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(mine, other, **CLOSE)


pairs = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731


@st.composite
def convolutions(draw) -> tuple[dict, tuple[int, ...], tuple[int, ...]]:
    """Options of a convolution, and shapes of pictures and kernels that go with them."""
    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(1, 3))
    padding, more = draw(pairs(0, 4)), draw(pairs(0, 5))
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + m
        for k, d, p, m in zip(kernel, dilation, padding, more, strict=True)
    ]
    c_in, c_out = draw(pairs(1, 3))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = (draw(st.integers(1, 3)), groups * c_in, *size)
    return options, shape, (groups * c_out, c_in, *kernel)


# convolution


@pytest.mark.parametrize("ours", [layers.conv2d, layers.conv2d_direct])
@given(case=convolutions(), seed=st.integers(0, 99))
def test_convolution_is_torchs(ours, case, seed):
    options, shape, kernel = case
    torch.manual_seed(seed)
    inputs = normal(*shape), normal(*kernel), normal(kernel[0])
    assert_same(lambda *a: ours(*a, **options), lambda *a: F.conv2d(*a, **options), *inputs)


@given(case=convolutions())
def test_gradients_of_gradients_of_convolution(case):
    options, shape, kernel = case
    inputs = normal(*shape), normal(*kernel), normal(kernel[0])
    convolve = lambda *a: layers.conv2d(*a, **options)  # noqa: E731
    assert torch.autograd.gradgradcheck(convolve, inputs, fast_mode=True)


def test_gradients_by_finite_differences():
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    inputs = normal(2, 4, 5, 6), normal(6, 2, 3, 2), normal(6)
    convolve = lambda *a: layers.conv2d(*a, **options)  # noqa: E731
    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_a_convolution_by_hand():
    """x = 1 2 / 3 4 and w = 1 0 / 0 −1: 1·1 − 4·1 = −3; with a frame of zeros the corners see
    −1, … and the whole is −1 −2 0 / −3 −3 2 / 0 3 4."""
    x, w = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.tensor([[[[1.0, 0], [0, -1]]]])
    assert layers.conv2d(x, w).tolist() == [[[[-3]]]]
    assert layers.conv2d(x, w, padding=1).tolist() == [[[[-1, -2, 0], [-3, -3, 2], [0, 3, 4]]]]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_number_of_pictures_unrolled_at_a_time_changes_nothing(groups, monkeypatch):
    x, w = normal(5, 4, 6, 7), normal(4, 4 // groups, 3, 3)
    convolve = lambda *a: layers.conv2d(*a, padding=1, groups=groups)  # noqa: E731
    for pictures in (1, 2, 5):
        monkeypatch.setattr(layers, "CACHE", pictures * 6 * 7 * 36 * 8)
        chunks = list(layers.im2col(x.detach(), (3, 3), (1, 1), (1, 1), (1, 1), groups))
        assert len(chunks) == -(-5 // pictures)
        assert_same(convolve, lambda *a: F.conv2d(*a, padding=1, groups=groups), x, w)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout_goes_in_and_channels_last_comes_out(layout):
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    w = torch.randn(4, 3, 3, 3).to(memory_format=layout)
    y = layers.conv2d(x, w)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, w), rtol=0, atol=1e-4)
    view = torch.randn(2, 8, 8, 6)[..., ::2].permute(0, 3, 1, 2)
    torch.testing.assert_close(layers.conv2d(view, w), F.conv2d(view, w), rtol=0, atol=1e-4)


def test_no_pictures_at_all():
    x, w = torch.zeros(0, 4, 6, 6, requires_grad=True), torch.randn(6, 2, 3, 3, requires_grad=True)
    y = layers.conv2d(x, w, stride=2, padding=1, groups=2)
    y.sum().backward()
    assert y.shape == (0, 6, 3, 3) and x.grad.shape == x.shape and (w.grad == 0).all()


def test_only_the_wanted_gradients_are_computed(monkeypatch):
    """The pictures need none in a first layer, and frozen kernels need none."""
    x, w = normal(1, 2, 5, 5), normal(2, 2, 3, 3)
    monkeypatch.setattr(layers, "input_gradient", None)
    layers.conv2d(x.detach(), w).sum().backward()
    monkeypatch.undo()
    monkeypatch.setattr(layers, "WeightGradient", None)
    layers.conv2d(x, w.detach()).sum().backward()
    assert x.grad.shape == x.shape and w.grad.shape == w.shape


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "complaint"),
    [
        ((1, 3, 8, 8), (4, 2, 3, 3), {}, "do not fit"),
        ((1, 4, 8, 8), (3, 2, 3, 3), {"groups": 2}, "do not fit"),
        ((3, 8, 8), (4, 3, 3, 3), {}, "do not fit"),
        ((1, 3, 2, 8), (4, 3, 3, 3), {}, "too small"),
        ((1, 3, 8, 4), (4, 3, 3, 3), {"dilation": 2}, "too small"),
    ],
)
def test_what_does_not_fit_is_refused(shape, kernel, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        layers.conv2d(torch.zeros(shape), torch.zeros(kernel), **options)


# pooling


@st.composite
def pools(draw) -> tuple[tuple, tuple[int, ...]]:
    """(kernel, stride, padding) and a shape of pictures."""
    kernel, stride = draw(pairs(1, 4)), draw(pairs(1, 3))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    size = [k + draw(st.integers(0, 5)) for k in kernel]
    return (kernel, stride, padding), (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *size)


@given(case=pools(), dilation=pairs(1, 2), distinct=st.booleans(), seed=st.integers(0, 99))
def test_max_pooling_is_torchs(case, dilation, distinct, seed):
    """Equal pixels too: the first one in a window gets the gradient."""
    (kernel, stride, padding), (n, c, h, w) = case
    torch.manual_seed(seed)
    x = normal(n, c, h + kernel[0], w + kernel[1])
    x = x if distinct else x.detach().sign().requires_grad_()
    arguments = kernel, stride, padding, dilation
    ours = lambda x: layers.max_pool2d(x, *arguments)  # noqa: E731
    assert_same(ours, lambda x: F.max_pool2d(x, *arguments), x)


@given(case=pools())
def test_average_pooling_is_torchs(case):
    arguments, shape = case
    ours = lambda x: layers.avg_pool2d(x, *arguments)  # noqa: E731
    assert_same(ours, lambda x: F.avg_pool2d(x, *arguments), normal(*shape))


def test_global_pooling_is_torchs():
    assert_same(layers.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1), normal(2, 3, 4, 5))


def test_stride_is_the_kernel_unless_given():
    x = normal(1, 1, 6, 6)
    assert_same(lambda x: layers.max_pool2d(x, 3), lambda x: F.max_pool2d(x, 3), x)
    assert_same(lambda x: layers.avg_pool2d(x, 3), lambda x: F.avg_pool2d(x, 3), x)


def test_not_a_number_is_passed_on():
    x = torch.zeros(1, 1, 2, 4)
    x[0, 0, 1, 0] = float("nan")
    assert layers.max_pool2d(x, 2).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("pool", [layers.max_pool2d, layers.avg_pool2d])
def test_a_window_needs_a_pixel(pool):
    """With more padding some windows would see the frame alone. torch refuses it as well."""
    with pytest.raises(ValueError, match="more than half"):
        pool(torch.zeros(1, 1, 4, 4), 2, 1, 2)
    with pytest.raises(ValueError, match="too small"):
        pool(torch.zeros(1, 1, 4, 4), 5)


@pytest.mark.parametrize(
    "layer",
    [
        layers.MaxPool2d(3, 2, 1),
        layers.AvgPool2d(3, 2, 1),
        layers.AdaptiveAvgPool2d(1),
        layers.BatchNorm2d(2, eps=1e-2).double(),
        layers.BatchNorm2d(2, eps=1e-2).double().eval(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_gradients_of_gradients(layer):
    assert torch.autograd.gradcheck(layer, normal(2, 2, 5, 4))
    assert torch.autograd.gradgradcheck(layer, normal(2, 2, 5, 4))


# batch normalisation


KINDS = {
    "default": {},
    "plain average": {"momentum": None},
    "odd constants": {"momentum": 0.37, "eps": 1e-2},
    "no scale": {"affine": False},
    "no buffers": {"track_running_stats": False},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_ten_steps_of_batch_normalisation_are_torchs(options):
    """Outputs, all gradients and the buffers, in training and then in use."""
    ours, theirs = (kind(3, **options).double() for kind in (layers.BatchNorm2d, nn.BatchNorm2d))
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data = parameter.data.normal_().clone()
    for step in range(10):
        x = (normal(step % 4 + 1, 3, 4, 5) * 3 + 7).detach().requires_grad_()
        assert_layers_agree(ours, theirs, x)
        for buffer, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, **CLOSE)
    assert_layers_agree(ours.eval(), theirs.eval(), x)


def assert_layers_agree(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """With the gradients by the picture and by each parameter."""
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    g = torch.randn_like(expected)
    mine = torch.autograd.grad(y, [x, *ours.parameters()], g)
    for one, other in zip(
        mine, torch.autograd.grad(expected, [x, *theirs.parameters()], g), strict=True
    ):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_running_variance_is_unbiased():
    """Of 1 and 3 the mean is 2, the biased variance 1 and the unbiased one 2."""
    layer = layers.BatchNorm2d(1, momentum=1.0, affine=False, eps=0.0)
    y = layer(torch.tensor([1.0, 3]).view(2, 1, 1, 1))
    assert y.flatten().tolist() == [-1, 1]
    assert (layer.running_mean.item(), layer.running_var.item()) == (2, 2)


def test_float32_far_from_zero():
    """Mean 1,000 and deviation 1: as near to the truth as torch."""
    x = 1000 + torch.randn(4, 3, 8, 8)
    exact = nn.BatchNorm2d(3).double()(x.double())
    errors = [(kind(3)(x) - exact).abs().max() for kind in (layers.BatchNorm2d, nn.BatchNorm2d)]
    assert errors[0] < 2 * errors[1] < 1e-3


def test_the_gradient_has_no_part_along_one_nor_along_the_output():
    x, g = normal(4, 3, 2, 2), normal(4, 3, 2, 2)
    y = layers.BatchNorm2d(3, eps=0.0, affine=False).double()(x)
    (by_x,) = torch.autograd.grad(y, x, g)
    assert by_x.sum((0, 2, 3)).abs().max() < 1e-12
    assert (by_x * y).sum((0, 2, 3)).abs().max() < 1e-12


def test_batch_mates_do_not_matter_in_use():
    layer = layers.BatchNorm2d(3)
    layer(torch.randn(8, 3, 4, 4))
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x)[:1], layer(x[:1]), rtol=0, atol=0)


def test_one_value_has_no_variance():
    layer = layers.BatchNorm2d(3)
    with pytest.raises(ValueError, match="no variance"):
        layer(torch.randn(1, 3, 1, 1))
    assert layer.eval()(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


# modules


def test_modules_have_the_arguments_and_names_of_torch():
    for name in ("Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "BatchNorm2d"):
        ours, theirs = getattr(layers, name), getattr(nn, name)
        assert issubclass(ours, theirs) and ours.forward is not theirs.forward
        if ours.__init__ is not theirs.__init__ and name != "AdaptiveAvgPool2d":
            assert str(inspect.signature(ours)) == "(*args, **kwargs)"  # handed on


def networks(preset: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same state dict, in which no parameter is 0 any more."""
    theirs = model.build(model.PRESETS[preset])
    ours = model.build(model.PRESETS[preset], layers=layers)
    assert any(isinstance(module, layers.Conv2d) for module in ours.modules())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("preset", ["fast", "lenet", "resnet20", "plain20", "resnet18-imagenet"])
def test_a_network_of_ours_is_the_network_of_torch(preset):
    """The same state dict gives the same logits, gradients and buffers in both."""
    ours, theirs = (net.double() for net in networks(preset))
    for _ in range(2):
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        logits = [net(x) for net in (ours, theirs)]
        assert logits[0].std() > 0.1
        torch.testing.assert_close(*logits, **CLOSE)
        for y in logits:
            nn.functional.cross_entropy(y, torch.arange(4)).backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_bfloat16_under_autocast():
    """As torch: products in bfloat16, moments and parameters in float32. 2⁻⁸ is its step."""
    ours, theirs = networks("resnet20")
    x = torch.randn(16, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.conv1(x).dtype == ours.bn1(ours.conv1(x)).dtype == torch.bfloat16
        logits = [net(x).float() for net in (ours, theirs)]
    logits.append(theirs(x))
    gradients = [
        torch.autograd.grad(y.square().mean(), list(net.parameters()))
        for y, net in zip(logits, (ours, theirs, theirs), strict=True)
    ]
    assert all(gradient.dtype == torch.float32 for gradient in gradients[0])
    gradients = [torch.cat([part.flatten() for part in parts]) for parts in gradients]
    for mine, other, exact in (logits, gradients):
        assert (mine - exact).norm() < 1.2 * (other - exact).norm() < 0.1 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        biased = layers.Conv2d(3, 4, 3)(x)
    assert biased.dtype == torch.bfloat16


def test_weight_gradients_in_bfloat16_are_summed_in_float32(monkeypatch):
    """300 pictures give 1 each, a picture at a time. A bfloat16 sum would stop at 256: 257 has no
    place there and is rounded back to 256."""
    monkeypatch.setattr(layers, "CACHE", 1)
    x = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)
    w = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    layers.conv2d(x, w).sum().backward()
    assert w.grad.item() == 300 and w.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "build",
    [
        lambda: layers.Conv2d(1, 1, 3, padding_mode="reflect"),
        lambda: layers.Conv2d(1, 1, 3, padding="same"),
        lambda: layers.MaxPool2d(2, ceil_mode=True),
        lambda: layers.MaxPool2d(2, return_indices=True),
        lambda: layers.AvgPool2d(2, ceil_mode=True),
        lambda: layers.AvgPool2d(2, count_include_pad=False),
        lambda: layers.AvgPool2d(2, divisor_override=3),
        lambda: layers.AdaptiveAvgPool2d(2),
    ],
)
def test_options_that_are_left_out_are_refused(build):
    with pytest.raises(ValueError, match="not among the layers"):
        build()


def test_nothing_of_torchs_layers_is_called(monkeypatch):
    """The forward passes work without the functions that they stand in for."""
    for name in ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "batch_norm"):
        monkeypatch.setattr(F, name, None)
        monkeypatch.setattr(torch, name, None, raising=False)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net = layers.Sequential(
        layers.Conv2d(3, 4, 3, padding=1),
        layers.BatchNorm2d(4),
        layers.MaxPool2d(2),
        layers.AvgPool2d(2),
        layers.AdaptiveAvgPool2d((1, 1)),
    )
    net(x).sum().backward()
    assert x.grad.shape == x.shape
