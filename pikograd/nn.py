"""Layers and losses: a `Module` is a tree of parameters with a forward.

Parameter names, shapes, initial distributions and defaults are torch's, so a torch state dict of
the same net loads and gives the same outputs (tests/test_nn.py).

Left out: lazy modules, sparse gradients, class weights, padding other than zeros, dilation,
`inplace=`, bidirectional LSTMs. MultiHeadAttention returns its output only, without the weights.
Dimension key: N batch, T time, C channels or classes, H W image, D features.
"""

import inspect
import math

import numpy as np

import tensor as pg
from engine import FLOATS, Modes, ShapeError, Tensor, as_tensor
from tensor import conv1d, conv2d, linear, max_pool1d, max_pool2d, softmax, stack, where


class Parameter(Tensor):
    """A Tensor that a Module counts among its parameters."""

    __slots__ = ()

    def __init__(self, data, requires_grad=True):
        super().__init__(data, requires_grad)


class Hook:
    """What `register_…_hook` returns: remove() undoes the registration."""

    def __init__(self, hooks, f):
        self.hooks, self.f = hooks, f
        hooks.append(f)

    def remove(self):
        if self.f in self.hooks:
            self.hooks.remove(self.f)


class Module:
    """Base of all layers: assign Parameters and Modules to attributes, write `forward`."""

    def __init__(self):
        self._parameters, self._buffers, self._modules = {}, {}, {}
        self._pre_hooks, self._hooks = [], []
        self.training = True

    def __getattr__(self, name):
        """Called for what is not there: says what was forgotten when that is super().__init__()."""
        kind = type(self).__name__
        if name in ("_parameters", "_modules", "_buffers", "_hooks", "_pre_hooks", "training"):
            raise AttributeError(
                f"{kind}.__init__ must call super().__init__() first, before it assigns a layer"
            )
        raise AttributeError(f"{kind} has no attribute {name!r}")

    def __setattr__(self, name, value):
        kind = next((k for k in (Parameter, Module) if isinstance(value, k)), None)
        for registry, own in (("_parameters", Parameter), ("_modules", Module)):
            if kind is own:
                getattr(self, registry)[name] = value
            else:  # what the name held before counts no longer
                self.__dict__.get(registry, {}).pop(name, None)
        if name in self.__dict__.get("_buffers", {}):
            self._buffers[name] = value
        super().__setattr__(name, value)

    def __delattr__(self, name):
        for registry in (self._parameters, self._buffers, self._modules):
            registry.pop(name, None)
        super().__delattr__(name)

    def register_buffer(self, name, value):
        """A tensor that is saved with the parameters but not trained."""
        self._buffers[name] = value
        super().__setattr__(name, value)

    def __call__(self, *args, **kwargs):
        for hook in self._pre_hooks:
            changed = hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        out = self.forward(*args, **kwargs)
        for hook in self._hooks:
            changed = hook(self, args, out)
            out = out if changed is None else changed
        return out

    def register_forward_pre_hook(self, f):
        """f(module, args) before each forward; what it returns, unless None, replaces the args."""
        return Hook(self._pre_hooks, f)

    def register_forward_hook(self, f):
        """f(module, args, out) after each forward; what it returns, unless None, replaces out."""
        return Hook(self._hooks, f)

    def forward(self, *args):
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def named_modules(self, prefix=""):
        """(dotted name, module) for this module and all below, each once."""
        seen, stack = set(), [(prefix, self)]
        while stack:
            name, module = stack.pop()
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module
                below = [(f"{name}.{k}" if name else k, m) for k, m in module._modules.items()]
                stack.extend(reversed(below))

    def modules(self):
        return (m for _, m in self.named_modules())

    def _named(self, registry):
        for prefix, module in self.named_modules():
            for name, value in getattr(module, registry).items():
                yield f"{prefix}.{name}" if prefix else name, value

    def named_parameters(self):
        """(dotted name, parameter), a shared one under its first name only."""
        seen = set()
        for name, p in self._named("_parameters"):
            if id(p) not in seen:
                seen.add(id(p))
                yield name, p

    def parameters(self):
        return [p for _, p in self.named_parameters()]

    def named_buffers(self):
        return self._named("_buffers")

    def state_dict(self):
        """Dotted name → Tensor, detached but of the same memory; shared ones under every name."""
        tensors = dict(self._named("_parameters")) | dict(self.named_buffers())
        return {name: t.detach() for name, t in tensors.items()}

    def load_state_dict(self, state):
        """Copy values in: Tensors, numpy arrays or torch tensors under the names of state_dict().

        Raises KeyError for missing or unexpected names and ShapeError for shapes that differ;
        then nothing has been loaded.
        """
        own = self.state_dict()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise KeyError(f"state dict: missing {missing or 'none'}, unexpected {extra or 'none'}")
        arrays = {k: np.asarray(v.array if isinstance(v, Tensor) else v) for k, v in state.items()}
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise ShapeError(
                    f"state dict: {name} has shape {array.shape}, the net has {own[name].shape}"
                )
        for name, array in arrays.items():
            own[name].array[...] = array
            own[name].bump("load_state_dict")

    def train(self, mode=True):
        for module in self.modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def zero_grad(self):
        for p in self.parameters():
            p.grad = None

    def to(self, dtype):
        """Change the dtype of all floating parameters and buffers."""
        for module in self.modules():
            for registry in (module._parameters, module._buffers):
                for t in registry.values():
                    if t.dtype in FLOATS:
                        t.array = t.array.astype(dtype)
                        t.bump("Module.to")
        return self

    def __repr__(self):
        rows = [f"({name}): {m!r}".replace("\n", "\n  ") for name, m in self._modules.items()]
        body = self.extra_repr() + "".join(f"\n  {row}" for row in rows) + ("\n" if rows else "")
        return f"{type(self).__name__}({body})"

    def extra_repr(self):
        return ""


class Sequential(Module):
    """One after the other. net[0] is a layer, net[:2] a Sequential of the same layers."""

    def __init__(self, *modules):
        super().__init__()
        for i, module in enumerate(modules):
            setattr(self, str(i), module)

    def forward(self, x):
        for module in self._modules.values():
            x = module(x)
        return x

    def __len__(self):
        return len(self._modules)

    def __getitem__(self, i):
        found = list(self._modules.values())[i]
        if not isinstance(i, slice):
            return found
        return type(self)(found) if isinstance(self, ModuleList) else type(self)(*found)

    def __iter__(self):
        return iter(self._modules.values())


class ModuleList(Sequential):
    """A list whose modules count; it has no forward."""

    def __init__(self, modules=()):
        super().__init__(*modules)

    def append(self, module):
        setattr(self, str(len(self)), module)
        return self

    def forward(self, x):
        raise NotImplementedError("ModuleList has no forward: call its modules")


class ModuleDict(Module):
    """A dictionary whose modules count; it has no forward."""

    def __init__(self, modules=()):
        super().__init__()
        for name, module in dict(modules).items():
            self[name] = module

    def __setitem__(self, name, module):
        setattr(self, name, module)

    def __getitem__(self, name):
        return self._modules[name]

    def __contains__(self, name):
        return name in self._modules

    def __iter__(self):
        return iter(self._modules)

    def __len__(self):
        return len(self._modules)

    def keys(self):
        """The names, in order."""
        return self._modules.keys()

    def values(self):
        """The modules, in order."""
        return self._modules.values()

    def items(self):
        """(name, module), in order."""
        return self._modules.items()


def _uniform(bound, *shape):
    return Parameter(pg.random.uniform(-bound, bound, shape).astype(np.float32))


class Linear(Module):
    """y = x·Wᵀ + b, x (…, in), W (out, in). W, b start uniform in ±1/√in."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        bound = 1 / math.sqrt(in_features)
        self.weight = _uniform(bound, out_features, in_features)
        self.bias = _uniform(bound, out_features) if bias else None

    def forward(self, x):
        return linear(x, self.weight, self.bias)

    def extra_repr(self):
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Conv2d(Module):
    """(N, C, H, W) → (N, O, H_out, W_out), H_out = (H + 2·padding − kernel) // stride + 1."""

    n_axes, convolve = 2, staticmethod(conv2d)

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1,
                 bias=True):  # fmt: skip
        super().__init__()
        shape = (out_channels, in_channels // groups, *pg._tuple(kernel_size, self.n_axes))
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.stride, self.padding, self.groups = stride, padding, groups
        self.weight = _uniform(bound, *shape)
        self.bias = _uniform(bound, out_channels) if bias else None

    def forward(self, x):
        return self.convolve(x, self.weight, self.bias, self.stride, self.padding, self.groups)

    def extra_repr(self):
        return f"{self.weight.shape}, stride={self.stride}, padding={self.padding}"


class Conv1d(Conv2d):
    """(N, C, L) → (N, O, L_out), L_out = (L + 2·padding − kernel) // stride + 1."""

    n_axes, convolve = 1, staticmethod(conv1d)


class ConvTranspose2d(Module):
    """(N, C, H, W) → (N, O, H_out, W_out), H_out = (H − 1)·stride − 2·padding + kernel +
    output_padding: the adjoint of Conv2d, which makes images larger. weight (C, O/groups, K, K)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0,
                 output_padding=0, groups=1, bias=True):  # fmt: skip
        super().__init__()
        kernel = pg._tuple(kernel_size, 2)
        bound = 1 / math.sqrt(out_channels // groups * math.prod(kernel))
        self.stride, self.padding, self.output_padding = stride, padding, output_padding
        self.groups = groups
        self.weight = _uniform(bound, in_channels, out_channels // groups, *kernel)
        self.bias = _uniform(bound, out_channels) if bias else None

    def forward(self, x):
        return pg.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding,
                                   self.output_padding, self.groups)  # fmt: skip

    def extra_repr(self):
        return f"{self.weight.shape}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(Module):
    """(N, C, H, W) → the maximum of each window; padding adds −∞ on both sides first."""

    pool = staticmethod(max_pool2d)

    def __init__(self, kernel_size, stride=None, padding=0):
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x):
        return self.pool(x, self.kernel_size, self.stride, self.padding)

    def extra_repr(self):
        return f"{self.kernel_size}"


class MaxPool1d(MaxPool2d):
    """(N, C, L) → the maximum of each window."""

    pool = staticmethod(max_pool1d)


class AvgPool2d(MaxPool2d):
    """(N, C, H, W) → the mean of each window; padding adds zeros, which count."""

    pool = staticmethod(pg.avg_pool2d)


class AvgPool1d(MaxPool2d):
    """(N, C, L) → the mean of each window."""

    pool = staticmethod(pg.avg_pool1d)


class AdaptiveAvgPool2d(Module):
    """(N, C, H, W) → (N, C, *output_size), whatever H and W are: means over equal shares."""

    def __init__(self, output_size):
        super().__init__()
        self.output_size = output_size

    def forward(self, x):
        return pg.adaptive_avg_pool2d(x, self.output_size)

    def extra_repr(self):
        return f"{self.output_size}"


class BatchNorm(Module):
    """x̂·γ + β with statistics per channel (axis 1): of the batch in training, running in eval.

    Ioffe & Szegedy 2015 (arXiv:1502.03167), Alg. 1. Running: (1 − momentum)·old + momentum·new,
    the new variance divided by n − 1. One class for BatchNorm1d and BatchNorm2d.
    """

    def __init__(self, num_features, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = Parameter(np.ones(num_features, np.float32))
        self.bias = Parameter(np.zeros(num_features, np.float32))
        self.register_buffer("running_mean", pg.zeros(num_features))
        self.register_buffer("running_var", pg.ones(num_features))
        self.register_buffer("num_batches_tracked", Tensor(0))

    def forward(self, x):
        dims = (0, *range(2, x.ndim))
        shape = (-1,) + (1,) * (x.ndim - 2)
        if self.training:
            if not Modes.recomputing:  # the second run of a checkpoint sees the same batch again
                self._track(x, dims)
            normed = pg.standardize(x, dims, self.eps)
        else:
            scale = (self.running_var + self.eps) ** -0.5
            normed = (x - self.running_mean.reshape(shape)) * scale.reshape(shape)
        return normed * self.weight.reshape(shape) + self.bias.reshape(shape)

    def _track(self, x, dims):
        n = x.numel() // x.shape[1]
        if n < 2 or x.hidden:
            why = "training inside vmap: call eval()" if x.hidden else "one value per channel"
            raise ShapeError(f"BatchNorm: {why}, shape {x.shape}")
        new = (x.array.mean(dims), x.array.var(dims) * (n / (n - 1)))
        for old, value in zip((self.running_mean, self.running_var), new, strict=True):
            old.copy_(Tensor((1 - self.momentum) * old.array + self.momentum * value))
        self.num_batches_tracked.add_(1)

    def extra_repr(self):
        return f"{self.weight.shape[0]}"


BatchNorm1d = BatchNorm2d = BatchNorm


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    """x̂·γ + β over the last axes, Ba et al. 2016 (arXiv:1607.06450), Eq. 3 and 4."""
    if x.shape[-len(normalized_shape) :] != tuple(normalized_shape):
        raise ShapeError(f"layer_norm: shapes {x.shape} and {tuple(normalized_shape)}")
    x = pg.standardize(x, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


class LayerNorm(Module):
    """layer_norm over the last axes, `normalized_shape` an int or a tuple."""

    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.shape, self.eps = pg._tuple(normalized_shape, 1), eps
        self.weight = Parameter(np.ones(self.shape, np.float32))
        self.bias = Parameter(np.zeros(self.shape, np.float32))

    def forward(self, x):
        return layer_norm(x, self.shape, self.weight, self.bias, self.eps)

    def extra_repr(self):
        return f"{self.shape}"


class RMSNorm(Module):
    """x/√(mean(x²) + eps)·γ over the last axis, Zhang & Sennrich 2019 (arXiv:1910.07467), Eq. 4.

    torch's default eps is the step of the dtype at 1, about 1.2e-7 in float32.
    """

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, Parameter(np.ones(d_model, np.float32))

    def forward(self, x):
        return x * (pg.mean(x * x, -1, keepdim=True) + self.eps) ** -0.5 * self.weight


class GroupNorm(Module):
    """x̂·γ + β over each group of channels, Wu & He 2018 (arXiv:1803.08494), Eq. 7."""

    def __init__(self, num_groups, num_channels, eps=1e-5):
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: {num_groups} groups do not divide {num_channels} channels"
            )
        self.num_groups, self.eps = num_groups, eps
        self.weight = Parameter(np.ones(num_channels, np.float32))
        self.bias = Parameter(np.zeros(num_channels, np.float32))

    def forward(self, x):
        size = math.prod(x.shape[1:]) // self.num_groups
        groups = pg.standardize(x.reshape(len(x), self.num_groups, size), -1, self.eps)
        shape = (-1,) + (1,) * (x.ndim - 2)
        return groups.reshape(x.shape) * self.weight.reshape(shape) + self.bias.reshape(shape)


class Embedding(Module):
    """Rows of a table: (…) integers → (…, D). Starts standard normal."""

    def __init__(self, num_embeddings, embedding_dim):
        super().__init__()
        self.weight = Parameter(pg.random.standard_normal((num_embeddings, embedding_dim))
                                .astype(np.float32))  # fmt: skip

    def forward(self, index):
        index = as_tensor(index)
        n = self.weight.shape[0]
        bad = index.array[(index.array < 0) | (index.array >= n)]
        if bad.size:
            raise IndexError(f"Embedding: index {bad[0]} outside the table of {n} rows")
        return self.weight[index]

    def extra_repr(self):
        return f"{self.weight.shape}"


class Dropout(Module):
    """In training each element is 0 with probability p, else divided by 1 − p."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        return pg.dropout(x, self.p, self.training)

    def extra_repr(self):
        return f"p={self.p}"


class Function(Module):
    """A layer without parameters: a function `f` of n_tensors tensors, with the options of f."""

    f, n_tensors = None, 1

    def __init__(self, *args, **options):
        super().__init__()
        names = getattr(self.f, "arguments", None) or inspect.signature(self.f).parameters
        names = list(names)[self.n_tensors :]
        self.options = dict(zip(names, args, strict=False)) | options
        if len(args) > len(names) or not set(options) <= set(names[len(args) :]):
            raise TypeError(f"{type(self).__name__}{(*args, *options)}: its options are {names}")

    def forward(self, *tensors):
        return self.f(*tensors, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class Identity(Function):
    """x itself."""

    f = staticmethod(lambda x: x)


class ReLU(Function):
    """max(x, 0)."""

    f = staticmethod(pg.relu)


class LeakyReLU(Function):
    """x for x > 0, else negative_slope·x; Maas et al. 2013."""

    f = staticmethod(pg.leaky_relu)


class Sigmoid(Function):
    """1/(1 + e⁻ˣ)."""

    f = staticmethod(pg.sigmoid)


class Tanh(Function):
    """tanh x."""

    f = staticmethod(pg.tanh)


class SiLU(Function):
    """x·σ(x); Elfwing et al. 2017 (arXiv:1702.03118)."""

    f = staticmethod(pg.silu)


class GELU(Function):
    """x·Φ(x), exact, or GELU(approximate="tanh")."""

    f = staticmethod(pg.gelu)


class Softplus(Function):
    """ln(1 + eˣ)."""

    f = staticmethod(pg.softplus)


class Softmax(Function):
    """eˣ / Σ eˣ along dim."""

    f = staticmethod(pg.softmax)


class LogSoftmax(Function):
    """x − ln Σ eˣ along dim."""

    f = staticmethod(pg.log_softmax)


class Flatten(Function):
    """(N, …) → (N, everything else)."""

    f = staticmethod(lambda x, start_dim=1, end_dim=-1: x.flatten(start_dim, end_dim))


def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False):
    """softmax(q·kᵀ/√D)·v, Vaswani et al. 2017 (arXiv:1706.03762), Eq. 1.

    q (…, T, D), k, v (…, S, D). attn_mask, broadcastable to (…, T, S): booleans, True = may look,
    or numbers to be added to q·kᵀ/√D. is_causal: position t looks at s ≤ t only. A row that may
    look nowhere gives 0, as in torch.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.mT  # (…, T, S)
    allowed = None if attn_mask is None else as_tensor(attn_mask)
    if allowed is not None and allowed.dtype != bool:
        scores, allowed = scores + where(allowed > -np.inf, allowed, 0.0), allowed > -np.inf
    if is_causal:
        seen = Tensor(np.tri(*scores.shape[-2:], dtype=bool))
        allowed = seen if allowed is None else allowed & seen
    weights = softmax(scores, -1) if allowed is None else pg.masked_softmax(scores, allowed)
    return weights @ v


class MultiHeadAttention(Module):
    """Attention in `num_heads` subspaces, §3.2.2 of the same paper; torch's MultiheadAttention.

    query (N, T, D), key and value (N, S, D), by default the query itself; → (N, T, D). Masks mean
    what they mean in torch's module: attn_mask (T, S) or (N·num_heads, T, S) with True = may NOT
    look (or numbers to add), key_padding_mask (N, S) with True = this key does not count.
    """

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.in_proj_weight = _uniform(math.sqrt(6 / (4 * embed_dim)), 3 * embed_dim, embed_dim)
        self.in_proj_bias = Parameter(np.zeros(3 * embed_dim, np.float32))
        self.out_proj = Linear(embed_dim, embed_dim)
        self.out_proj.bias.array[:] = 0.0

    def forward(self, query, key=None, value=None, key_padding_mask=None, attn_mask=None,
                is_causal=False):  # fmt: skip
        if key is None:
            parts = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            inputs = (query, key, key if value is None else value)
            weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            parts = [linear(*a) for a in zip(inputs, weights, biases, strict=True)]
        q, k, v = (self._split(p) for p in parts)
        mask = self._mask(key_padding_mask, attn_mask, len(query))
        out = scaled_dot_product_attention(q, k, v, mask, is_causal)  # (N, heads, T, D/heads)
        return self.out_proj(out.transpose(1, 2).reshape(query.shape))

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def _mask(self, padding, mask, n):
        """Both masks as one that scaled_dot_product_attention understands: True = may look."""
        if mask is not None:
            mask = as_tensor(mask)
            if mask.ndim == 3:
                mask = mask.reshape(n, self.num_heads, *mask.shape[1:])
            mask = ~mask if mask.dtype == bool else mask
        if padding is None:
            return mask
        counts = ~as_tensor(padding)[:, None, None]
        if mask is None or mask.dtype == bool:
            return counts if mask is None else mask & counts
        return where(counts, mask, -np.inf)


class _Cell(Module):
    """Weights of a recurrent cell with `gates` blocks of size H; all uniform in ±1/√H."""

    def __init__(self, input_size, hidden_size, gates):
        super().__init__()
        bound = 1 / math.sqrt(hidden_size)
        self.hidden_size = hidden_size
        self.weight_ih = _uniform(bound, gates * hidden_size, input_size)
        self.weight_hh = _uniform(bound, gates * hidden_size, hidden_size)
        self.bias_ih = _uniform(bound, gates * hidden_size)
        self.bias_hh = _uniform(bound, gates * hidden_size)

    def start(self, x):
        return pg.zeros(x.shape[0], self.hidden_size, dtype=x.dtype)

    def both(self, x, h):
        """The input's and the state's share of all gates: (N, gates·H) each."""
        own = linear(x, self.weight_ih, self.bias_ih)
        return own, linear(h, self.weight_hh, self.bias_hh)


class RNNCell(_Cell):
    """h' = tanh(W_i·x + b_i + W_h·h + b_h), Elman 1990."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size, 1)

    def forward(self, x, h=None):
        a, b = self.both(x, self.start(x) if h is None else h)
        return (a + b).tanh()


def lstm_step(gates, c):
    """i, f, o = σ(…), g = tanh(…) of the blocks of `gates`; c' = f·c + i·g; h' = o·tanh(c')."""
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


class LSTMCell(_Cell):
    """i, f, o = σ(…), g = tanh(…); c' = f·c + i·g; h' = o·tanh(c'). Gers et al. 2000."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size, 4)

    def forward(self, x, state=None):
        h, c = (self.start(x), self.start(x)) if state is None else state
        a, b = self.both(x, h)
        return lstm_step(a + b, c)


class LSTM(Module):
    """Layers of LSTM cells run over time: (T, N, D) → (T, N, H), ((layers, N, H), (layers, N, H)).

    batch_first: (N, T, D) → (N, T, H). state: (h, c) of every layer to start from, else zeros.
    """

    def __init__(self, input_size, hidden_size, num_layers=1, batch_first=False):
        super().__init__()
        self.hidden_size, self.num_layers, self.batch_first = hidden_size, num_layers, batch_first
        bound, width = 1 / math.sqrt(hidden_size), input_size
        for k in range(num_layers):
            setattr(self, f"weight_ih_l{k}", _uniform(bound, 4 * hidden_size, width))
            setattr(self, f"weight_hh_l{k}", _uniform(bound, 4 * hidden_size, hidden_size))
            setattr(self, f"bias_ih_l{k}", _uniform(bound, 4 * hidden_size))
            setattr(self, f"bias_hh_l{k}", _uniform(bound, 4 * hidden_size))
            width = hidden_size

    def forward(self, x, state=None):
        x, ends = x.transpose(0, 1) if self.batch_first else x, []
        for k in range(self.num_layers):
            start = pg.zeros(x.shape[1], self.hidden_size, dtype=x.dtype)
            x, end = self._layer(k, x, (start, start) if state is None else [s[k] for s in state])
            ends.append(end)
        x = x.transpose(0, 1) if self.batch_first else x
        return x, tuple(stack(part) for part in zip(*ends, strict=True))

    def _layer(self, k, x, state):
        w_ih, w_hh, b_ih, b_hh = list(self._parameters.values())[4 * k : 4 * k + 4]
        own, outputs, (h, c) = linear(x, w_ih, b_ih), [], state  # all times in one product
        for gates in own:
            h, c = lstm_step(gates + linear(h, w_hh, b_hh), c)
            outputs.append(h)
        return stack(outputs), (h, c)


class GRUCell(_Cell):
    """r, z = σ(…); n = tanh(W·x + b + r·(U·h + b')); h' = (1 − z)·n + z·h. Cho et al. 2014
    (arXiv:1406.1078), Eq. 5–8, with r where torch has it: after the product with U."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size, 3)

    def forward(self, x, h=None):
        h = self.start(x) if h is None else h
        a, b = self.both(x, h)
        (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
        z = (az + bz).sigmoid()
        n = (an + (ar + br).sigmoid() * bn).tanh()
        return n + z * (h - n)


# ── Losses ────────────────────────────────────────────────────────────────────────────────────────


def _reduce(rows, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is none of 'mean', 'sum', 'none'")
    return {"mean": rows.mean, "sum": rows.sum, "none": lambda: rows}[reduction]()


def cross_entropy(logits, target, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """−Σ q·log softmax(logits) in nats, q one-hot, or (1 − ε)·one-hot + ε/C with smoothing ε.

    logits (N, C, …), target (N, …) integers, or (C,) and a single one; the mean is over targets ≠
    ignore_index. Equals ln C for equal logits. Raises IndexError for a target outside [0, C).
    """
    target, rest = as_tensor(target), logits.shape[:1] + logits.shape[2:]
    if not logits.ndim or target.shape != (rest if logits.ndim > 1 else ()):
        raise ShapeError(f"cross_entropy: shapes {logits.shape} and {target.shape}")
    x = logits.permute(0, *range(2, logits.ndim), 1) if logits.ndim > 2 else logits
    used = target != ignore_index
    bad = target.array[used.array & ((target.array < 0) | (target.array >= x.shape[-1]))]
    if bad.size:
        raise IndexError(f"cross_entropy: target {bad[0]} of {x.shape[-1]} classes")
    ignored = not used.array.all()
    rows = pg.cross_entropy_rows(x, where(used, target, 0) if ignored else target)
    if label_smoothing:
        uniform = pg.logsumexp(x, -1) - x.mean(-1)
        rows = (1 - label_smoothing) * rows + label_smoothing * uniform
    if not ignored:
        return _reduce(rows, reduction)
    rows = where(used, rows, 0.0)
    return rows.sum() / used.sum() if reduction == "mean" else _reduce(rows, reduction)


def mse_loss(x, y, reduction="mean"):
    """(x − y)²."""
    return _reduce(_same(x, y, "mse_loss").square(), reduction)


def l1_loss(x, y, reduction="mean"):
    """|x − y|."""
    return _reduce(_same(x, y, "l1_loss").abs(), reduction)


def _same(x, y, name):
    y = as_tensor(y)
    if x.shape != y.shape:
        raise ShapeError(f"{name}: shapes {x.shape} and {y.shape} differ")
    return x - y


def binary_cross_entropy_with_logits(x, y, reduction="mean"):
    """−y·log σ(x) − (1 − y)·log(1 − σ(x)) = softplus(x) − x·y, for y in [0, 1]."""
    _same(x, y, "binary_cross_entropy_with_logits")
    return _reduce(pg.softplus(x) - x * y, reduction)


def _loss(f):
    """The loss function f as a layer, f's options at the making: MSELoss(reduction="sum")(x, y)."""
    return type(
        f.__name__, (Function,), {"f": staticmethod(f), "n_tensors": 2, "__doc__": f.__doc__}
    )


MSELoss, L1Loss, CrossEntropyLoss, BCEWithLogitsLoss = (
    _loss(f) for f in (mse_loss, l1_loss, cross_entropy, binary_cross_entropy_with_logits)
)


def unroll(cell, xs, state=None):
    """Run a recurrent cell over (T, N, D): returns (all outputs (T, N, H), the last state)."""
    outputs = []
    for x in xs:
        state = cell(x, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return stack(outputs), state
