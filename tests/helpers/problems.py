"""Kernel test problems for CPU, Triton's interpreter and GPU, without optional dependencies."""

import numpy as np
import torch

from fastbyol import schedules
from fastbyol.kernels import augment, augment_params, lars_ema

# --- LARS and target ---

ETA = 1e-3
SIZES = [1, 3, 127, 4097, 2**20 + 1]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
HYPERS = [(1e-4, 0.9, ETA), (0.0, 0.9, None)]  # weight decay, momentum, trust coefficient of the two groups


class Problem:
    """Parameters of given shapes and a float64 reference of their updates."""

    def __init__(self, shapes, *, seed=0, dtype=torch.float32, scale=1.0):
        self.rng, self.dtype, self.scale = np.random.default_rng(seed), dtype, scale
        self.groups = [k % 3 == 2 for k in range(len(shapes))]  # every third: no weight decay, no trust ratio
        self.weights = [self.random(shape) for shape in shapes]
        self.targets = [self.random(shape) if k % 4 else None for k, shape in enumerate(shapes)]
        self.grads = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self.momenta = [torch.zeros_like(w) for w in self.weights]
        self.lr, self.tau = torch.tensor(0.0), torch.tensor(0.0)
        self.inv_scale, self.found_inf = torch.tensor(1 / scale), torch.tensor(0.0)
        self.hypers = [
            lars_ema.Hyper(lr=self.lr, weight_decay=wd, momentum=mu, trust_coefficient=eta) for wd, mu, eta in HYPERS
        ]
        self.exact = [[None if x is None else x.double().cpu().numpy() for x in row] for row in self.rows()]

    def random(self, shape):
        return torch.tensor(self.rng.normal(size=shape), dtype=torch.float32)

    def rows(self):
        return list(zip(self.weights, self.grads, self.momenta, self.targets, strict=True))

    def new_gradients(self, poison=None, poisoned=1):
        for k, g in enumerate(self.grads):
            g.copy_(self.scale * self.random(g.shape))
            if poison is not None and k == poisoned:
                g.view(-1)[-1] = poison

    def step(self, update, k, steps):
        self.lr.fill_(schedules.learning_rate(k, peak=3.0, warmup_steps=5, total_steps=steps))
        self.tau.fill_(schedules.target_decay(k, base=0.9, total_steps=steps))
        scaled = {"inv_scale": self.inv_scale, "found_inf": self.found_inf.zero_()} if self.scale != 1 else {}
        update(self.rows(), [int(g) for g in self.groups], self.hypers, self.tau, **scaled)

    def exact_step(self):
        for row, g, group in zip(self.exact, self.grads, self.groups, strict=True):
            wd, mu, eta = HYPERS[group]
            w, m, t = row[0], row[2], row[3]
            u = g.double().cpu().numpy() / self.scale + wd * w
            w_norm, u_norm = np.linalg.norm(w), np.linalg.norm(u)
            r = eta * w_norm / u_norm if eta is not None and w_norm > 0 and u_norm > 0 else 1.0
            m = mu * m + r * u
            w = w - self.lr.item() * m
            row[0], row[2] = w, m
            if t is not None:
                row[3] = t + (1 - self.tau.item()) * (w - t)

    def largest_error(self):
        """Return the largest relative error (in norm) of all weights, momenta and targets."""
        errors = []
        for row, exact in zip(self.rows(), self.exact, strict=True):
            for k in (0, 2, 3):
                if exact[k] is not None:
                    size = np.linalg.norm(exact[k])
                    errors.append(np.linalg.norm(row[k].double().cpu().numpy() - exact[k]) / (size if size > 0 else 1))
        return max(errors)


def odd_shapes(count):
    rng = np.random.default_rng(1)
    return [(int(n),) for n in [*SIZES, *(2 * rng.integers(1, 1500, size=count - len(SIZES)) + 1)]]


# --- views ---


def parameter_row(**columns: float) -> np.ndarray:
    """Return the parameter row of a view from column names; ORDER takes a sequence."""
    row = np.zeros(augment_params.COLUMNS, dtype=np.float32)
    row[augment_params.ORDER : augment_params.ORDER + 4] = columns.pop("ORDER", range(4))
    for name, value in columns.items():
        row[getattr(augment_params, name)] = value
    return row


def random_view(seed: int, size: int) -> torch.Tensor:
    """Return a (3, S, S) view with colors, exact grays, black, white and saturated pixels."""
    view = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))
    view[:, 0] = view[0, 0]
    view[:, 1, : size // 2], view[:, 1, size // 2 :] = 0, 1
    view[1:, 2] = 0
    return view


def reference(crops, rows):
    """Return the normalized reference views, (N, 3, S, S) float32."""
    views = [
        augment.augment_reference(c.permute(2, 0, 1).float() / 255, row) for c, row in zip(crops, rows, strict=True)
    ]
    return augment.normalize_reference(torch.stack(views))


def largest_error(actual, expected):
    """Return the largest absolute difference of the values in [0, 1] before normalization."""
    return float(((actual.float() - expected) * torch.tensor(augment_params.IMAGENET_STD)[:, None, None]).abs().max())


def crops_of(count, size):
    return torch.stack([(random_view(k, size) * 255).round().byte().permute(1, 2, 0) for k in range(count)])


def images():
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (7, 3), (40, 61), (375, 500), (64, 64)]
    return [torch.from_numpy(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def reference_update(rows, groups, hypers, tau, **scaling):
    for row, group in zip(rows, groups, strict=True):
        h = hypers[group]
        lars_ema.lars_ema_reference(
            *row,
            lr=h.lr,
            tau=tau,
            weight_decay=h.weight_decay,
            momentum=h.momentum,
            trust_coefficient=h.trust_coefficient,
            **scaling,
        )
