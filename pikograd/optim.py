"""Optimizers, schedules and clipping: each update rule beside its equation.

x parameter, g gradient, η lr, λ weight_decay, t step from 1. Updates run in place on the arrays,
with one scratch array per parameter, and count as a write of the parameter. Rules, names and
defaults are torch's (Lion: the paper's), tests/test_optim.py holds them to 1e-12.

Left out: sparse gradients, maximize, amsgrad, per-parameter `foreach` and `fused` variants.
"""

import math

import numpy as np

from engine import ShapeError, Tensor


class Optimizer:
    """Base: parameter groups, state per parameter, state_dict.

    params: tensors, or dicts {"params": tensors, "lr": …} whose options override the defaults;
    they are kept in `param_groups`, whose numbers may be changed at any time.
    A subclass names its `slots` (arrays of the parameter's shape, zero at first) and writes
    `update(x, g, s, o, t)`: arrays x, g, slots and scratch s, options o. It must leave g as it is.
    """

    slots = ()

    def __init__(self, params, **defaults):
        params = list(params)
        if not params:
            raise ValueError("optimizer: no parameters given")
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        self.param_groups = [defaults | g | {"params": list(g["params"])} for g in groups]
        for group in self.param_groups:
            self._check(group, defaults)
        if len(set(self.parameters())) < len(self.parameters()):
            raise ValueError("optimizer: a parameter is given twice and would be updated twice")
        self.state = {}  # index of the parameter → {"step": t, slot: array, …}

    def _check(self, group, defaults):
        unknown = group.keys() - defaults.keys() - {"params"}
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        if not group["lr"] >= 0:
            raise ValueError(f"lr must be ≥ 0, not {group['lr']}")
        for p in group["params"]:
            if not isinstance(p, Tensor) or not p.is_leaf or not p.requires_grad:
                raise ValueError(
                    "optimizer: every parameter must be a leaf that requires gradients"
                )

    @property
    def lr(self):
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value):
        for group in self.param_groups:
            group["lr"] = value

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def zero_grad(self):
        for p in self.parameters():
            p.grad = None

    def step(self):
        """One update of every parameter that has a gradient."""
        i = -1
        for group in self.param_groups:
            for p in group["params"]:
                i += 1
                if p.grad is None:
                    continue
                s = self.state.get(i) or self._start(i, p)
                s["step"] += 1
                self.update(p.array, p.grad.array, s, group, s["step"])
                p.bump(f"{type(self).__name__}.step")

    def _start(self, i, p):
        names = (*self.slots, "scratch")
        self.state[i] = {"step": 0} | {name: np.zeros_like(p.array) for name in names}
        return self.state[i]

    def state_dict(self):
        """All that is needed to go on exactly: options and slots, under flat names."""
        out = {f"group{k}.{n}": v for k, g in enumerate(self.param_groups) for n, v in g.items()
               if n != "params"}  # fmt: skip
        for i, s in self.state.items():
            out |= {f"{i}.{name}": s[name] for name in ("step", *self.slots)}
        return out

    def load_state_dict(self, state):
        """Take back what state_dict gave. Raises KeyError for names of another optimizer."""
        params = self.parameters()
        for name, value in state.items():
            where, _, key = name.partition(".")
            if where.startswith("group"):
                value = np.asarray(value).tolist()
                self.param_groups[int(where[5:])][key] = (
                    tuple(value) if isinstance(value, list) else value
                )
                continue
            if key not in ("step", *self.slots) or not int(where) < len(params):
                raise KeyError(f"optimizer state {name!r} does not belong to {type(self).__name__}")
            s = self.state.get(int(where)) or self._start(int(where), params[int(where)])
            if np.shape(value) != np.shape(s[key]):
                raise ShapeError(f"optimizer state {name!r} has shape {np.shape(value)}")
            s[key] = int(value) if key == "step" else np.array(value, s[key].dtype)

    def update(self, x, g, s, o, t):
        raise NotImplementedError


def decayed(x, g, s, o):
    """g + λx: weight decay as a penalty ½λ‖x‖² in the loss. g itself when λ = 0."""
    if not o["weight_decay"]:
        return g
    np.multiply(x, o["weight_decay"], out=s["scratch"])
    s["scratch"] += g
    return s["scratch"]


def blend(average, new, beta, tmp):
    """average ← β·average + (1 − β)·new."""
    np.multiply(new, 1 - beta, out=tmp)
    average *= beta
    average += tmp


class SGD(Optimizer):
    """g ← g + λx;  b ← μb + g (b = g at first);  x ← x − η·b, or with Nesterov η·(g + μb).

    Sutskever et al. 2013, Eq. 1–4, in torch's form, where η stands outside b.
    """

    slots = ("velocity",)

    def __init__(self, params, lr=1e-3, momentum=0.0, nesterov=False, weight_decay=0.0):
        if nesterov and not momentum > 0:
            raise ValueError("SGD: nesterov needs momentum > 0")
        super().__init__(params, lr=lr, momentum=momentum, nesterov=nesterov,
                         weight_decay=weight_decay)  # fmt: skip

    def update(self, x, g, s, o, t):
        g, b, mu = decayed(x, g, s, o), s["velocity"], o["momentum"]
        if not mu:
            x -= o["lr"] * g
            return
        b *= mu  # b starts at zero, so the first b is g
        b += g
        x -= o["lr"] * (g + mu * b if o["nesterov"] else b)


class RMSprop(Optimizer):
    """g ← g + λx;  v ← αv + (1 − α)g²;  x ← x − η·g/(√v + ε). Hinton 2012, lecture 6e."""

    slots = ("square",)

    def __init__(self, params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)

    def update(self, x, g, s, o, t):
        g, v = decayed(x, g, s, o), s["square"]
        v *= o["alpha"]
        v += (1 - o["alpha"]) * (g * g)
        x -= o["lr"] * g / (np.sqrt(v) + o["eps"])


class Adagrad(Optimizer):
    """g ← g + λx;  v ← v + g²;  x ← x − η·g/(√v + ε). Duchi et al. 2011, §1.1."""

    slots = ("square",)

    def __init__(self, params, lr=1e-2, eps=1e-10, weight_decay=0.0):
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)

    def update(self, x, g, s, o, t):
        g, v = decayed(x, g, s, o), s["square"]
        v += g * g
        x -= o["lr"] * g / (np.sqrt(v) + o["eps"])


class Adam(Optimizer):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  x ← x − η·m̂/(√v̂ + ε),
    m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ). Kingma & Ba 2015 (arXiv:1412.6980), Alg. 1; g ← g + λx.

    Computed as η√c/(1 − β₁ᵗ) · m/(√v + ε√c) with c = 1 − β₂ᵗ: the same number in fewer passes.
    """

    slots = ("mean", "square")

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, x, g, s, o, t):
        self.adam(x, decayed(x, g, s, o), s, o, t)

    def adam(self, x, g, s, o, t):
        (beta1, beta2), m, v = o["betas"], s["mean"], s["square"]
        root = math.sqrt(1 - beta2**t)
        tmp = np.multiply(g, g)
        tmp *= 1 - beta2
        v *= beta2
        v += tmp
        blend(m, g, beta1, tmp)
        np.sqrt(v, out=tmp)
        tmp += o["eps"] * root
        np.divide(m, tmp, out=tmp)
        tmp *= o["lr"] * root / (1 - beta1**t)
        x -= tmp


class AdamW(Adam):
    """x ← x − ηλx, then Adam without λ. Loshchilov & Hutter 2019 (arXiv:1711.05101), Alg. 2.

    As in torch the weights shrink by the factor 1 − lr·λ a step. The paper shrinks them by 1 − η·λ,
    where η is the schedule alone, without the base learning rate: its λ is lr times ours.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        super().__init__(params, lr, betas, eps, weight_decay)

    def update(self, x, g, s, o, t):
        x *= 1 - o["lr"] * o["weight_decay"]
        self.adam(x, g, s, o, t)


class Lion(Optimizer):
    """x ← x − η·(sign(β₁m + (1 − β₁)g) + λx);  m ← β₂m + (1 − β₂)g.

    Chen et al. 2023 (arXiv:2302.06675), Alg. 2.
    """

    slots = ("mean",)

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def update(self, x, g, s, o, t):
        (beta1, beta2), m, tmp = o["betas"], s["mean"], s["scratch"]
        direction = np.sign(beta1 * m + (1 - beta1) * g)
        x -= o["lr"] * (direction + o["weight_decay"] * x)
        blend(m, g, beta2, tmp)


class Muon(Optimizer):
    """b ← μb + (1 − μ)g;  O = orthogonalize(g + μ(b − g), Nesterov, or b);
    x ← x − ηλx;  x ← x − η·√max(1, rows/columns)·O. Matrices only.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; defaults and order as torch.optim.Muon,
    which rounds to bfloat16 in `orthogonalize`: here it is done in the dtype of x. Ten steps with
    lr 0.02 therefore end within a few 1e-3 of torch's, and within 1e-12 of torch's without rounding
    (both tested).
    """

    slots = ("mean",)

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum,
                         nesterov=nesterov, ns_steps=ns_steps)  # fmt: skip
        for p in self.parameters():
            if p.ndim != 2:
                raise ShapeError(f"Muon is for matrices, a parameter has shape {p.shape}")

    def update(self, x, g, s, o, t):
        m, mu = s["mean"], o["momentum"]
        blend(m, g, mu, s["scratch"])
        direction = orthogonalize(g + mu * (m - g) if o["nesterov"] else m, o["ns_steps"])
        x *= 1 - o["lr"] * o["weight_decay"]
        x -= o["lr"] * math.sqrt(max(1.0, x.shape[0] / x.shape[1])) * direction


def orthogonalize(g, steps=5, eps=1e-7):
    """U·Vᵀ of g = U·S·Vᵀ, roughly: all singular values moved to between about 0.7 and 1.2.

    Newton–Schulz with the quintic aX + (bA + cA²)X, A = XXᵀ, tuned for speed and not for accuracy.
    """
    a, b, c = 3.4445, -4.775, 2.0315
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / max(np.linalg.norm(x), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


# ── Clipping ──────────────────────────────────────────────────────────────────────────────────────


def clip_grad_norm_(params, max_norm):
    """Scale all gradients by min(1, max_norm/(norm + 1e-6)), norm over all of them together.

    Returns the norm before. Pascanu et al. 2013 (arXiv:1211.5063), Alg. 1.
    """
    found = [p.grad for p in params if p.grad is not None]
    norm = math.sqrt(sum(float(np.vdot(g.array, g.array)) for g in found))
    if max_norm / (norm + 1e-6) < 1:
        for g in found:
            g.array *= max_norm / (norm + 1e-6)
            g.bump("clip_grad_norm_")
    return norm


def clip_grad_value_(params, limit):
    """Clip every element of every gradient to ±limit."""
    for p in params:
        if p.grad is not None:
            np.clip(p.grad.array, -limit, limit, out=p.grad.array)
            p.grad.bump("clip_grad_value_")


# ── Schedules: the factor on lr at step t = 0, 1, … ───────────────────────────────────────────────


def step_decay(t, size, gamma=0.1):
    """γ^⌊t/size⌋."""
    return gamma ** (t // size)


def warmup_cosine(t, warmup, total, floor=0.0):
    """(t + 1)/warmup up to 1, then half a cosine to `floor` at t = total (arXiv:1608.03983)."""
    if t < warmup:
        return (t + 1) / warmup
    done = min(1.0, (t - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def one_cycle(t, total, rise=0.3, start=1 / 25, end=1e-4 / 25):
    """From `start` up to 1 in rise·total steps, then down to `end`, both by half a cosine.

    Smith & Topin 2017 (arXiv:1708.07120), in the form and with the defaults of torch's OneCycleLR.
    """
    peak, last = rise * total - 1, total - 1
    if t <= peak:
        a, b, done = start, 1.0, t / peak if peak else 1.0
    else:
        a, b, done = 1.0, end, (t - peak) / (last - peak)
    return b + (a - b) * 0.5 * (1 + math.cos(math.pi * done))


class Schedule:
    """Sets lr = base·factor(t) on every group: now for t = 0, and at each step() for the next t."""

    def __init__(self, optimizer, factor):
        self.optimizer, self.factor, self.t = optimizer, factor, -1
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.step()

    def step(self):
        self.t += 1
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * self.factor(self.t)
