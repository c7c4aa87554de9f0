"""BatchNorm per view with residual and ReLU: every implementation against torch in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch.nn import functional as F

from fastbyol.kernels.batch_norm import batch_norm, batch_norm_reference
from fastbyol.kernels.batch_norm_torch import batch_norm_composite
from fastbyol.kernels.cpu import batch_norm as cpu
from fastbyol.kernels.cpu import openmp
from fastbyol.kernels.cpu.batch_norm import batch_norm_cpu
from fastbyol.kernels.cpu.intrinsics import HAS_BFLOAT16_CONVERSION, LANES, round_bfloat16
from fastbyol.kernels.cpu.simd import load_vector

EPS = 1e-5
IMPLEMENTATIONS = [batch_norm_cpu, batch_norm_composite, batch_norm_reference]
SHAPES = [(6, 5, 3, 7), (12, 37), (6, LANES, 5, 5), (12, 2 * LANES + 3, 24, 25), (18, 1, 1, 1), (6, 1100, 2, 3)]


def torch_batch_norm(x, residual, weight, bias, *, views, relu):
    """F.batch_norm per view, add and relu in x's dtype."""
    y = torch.cat([F.batch_norm(v, None, None, weight, bias, training=True, eps=EPS) for v in x.chunk(views)])
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


class Problem:
    def __init__(self, shape, *, dtype=torch.float32, residual=True, mean=0.3, seed=0, channels_last=True):
        rng = torch.Generator().manual_seed(seed)

        def draw():
            t = torch.randn(shape, generator=rng)
            return t.to(memory_format=torch.channels_last) if channels_last and t.ndim == 4 else t

        self.x = (2 * draw() + mean).to(dtype)
        self.residual = draw().to(dtype) if residual else None
        self.weight = torch.randn(shape[1], generator=rng)
        self.bias = torch.randn(shape[1], generator=rng)
        self.dy = draw().to(dtype)

    def tensors(self, dtype=None):
        tensors = (self.x, self.residual, self.weight, self.bias)
        return [None if t is None else t.clone().to(dtype or t.dtype).requires_grad_() for t in tensors]

    def run(self, f, dtype=None, **options):
        """Return [y, mean, var] and the gradients of x, residual, weight, bias."""
        tensors = self.tensors(dtype)
        result = f(*tensors, **options)
        result = result if isinstance(result, tuple) else (result,)
        result[0].backward(self.dy.to(result[0].dtype))
        return [t.detach() for t in result], [t.grad for t in tensors if t is not None]

    def exact(self, views, relu):
        return self.run(torch_batch_norm, torch.float64, views=views, relu=relu)


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)])
def test_float32_equals_float64(f, shape, residual, relu):
    for views in (1, 2, 3):
        problem = Problem(shape, residual=residual)
        (y, mean, var), gradients = problem.run(f, views=views, eps=EPS, relu=relu)
        (exact_y,), exact_gradients = problem.exact(views, relu)
        rows = problem.x.double().movedim(1, -1).reshape(views, -1, shape[1])
        assert (mean.double() - rows.mean(1)).abs().max() < 1e-5
        assert (var.double() - rows.var(1, correction=0)).abs().max() < 2e-5
        assert y.stride() == problem.x.stride()
        assert error(y, exact_y) < 1e-5
        # With six values per view dx is a difference of larger terms.
        assert max(error(*pair) for pair in zip(gradients, exact_gradients, strict=True)) < 1e-5


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)])
def test_bfloat16_error_is_at_most_twice_torch_s(f, shape, residual, relu):
    """Errors against float64."""
    problem = Problem(shape, dtype=torch.bfloat16, residual=residual)
    (y, _, _), gradients = problem.run(f, views=2, eps=EPS, relu=relu)
    (plain_y,), plain = problem.run(torch_batch_norm, views=2, relu=relu)
    (exact_y,), exact = problem.exact(2, relu)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [t.dtype for t in problem.tensors() if t is not None]
    for actual, torch_s, expected in zip([y, *gradients], [plain_y, *plain], [exact_y, *exact], strict=True):
        assert error(actual, expected) <= max(2 * error(torch_s, expected), 1e-5)


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
def test_large_mean_costs_no_precision(f):
    """The reference and torch's kernels may lose as much as torch's BatchNorm."""
    problem = Problem((8, 21, 9, 9), mean=1000, residual=False)
    (y, _, var), gradients = problem.run(f, views=2, eps=EPS, relu=False)
    (exact_y,), exact = problem.exact(2, False)
    (plain_y,), plain = problem.run(torch_batch_norm, views=2, relu=False)
    worst, torch_s = (max(error(*pair) for pair in zip(found, exact, strict=True)) for found in (gradients, plain))
    ours = f in (batch_norm_cpu, batch_norm_composite)
    assert error(y, exact_y) <= (2e-6 if ours else 2 * error(plain_y, exact_y))  # torch's own: 1e-5 to 1e-4
    assert ((var - problem.x.double().movedim(1, -1).reshape(2, -1, 21).var(1, correction=0)) / var).abs().max() < 1e-5
    if f is not batch_norm_reference:
        assert worst < (1e-5 if ours else 2 * torch_s)  # torch's own: 2e-4


def test_other_memory_formats_give_the_same_result():
    for dtype in (torch.float32, torch.bfloat16):
        last = Problem((6, 20, 5, 4), dtype=dtype)
        first = Problem((6, 20, 5, 4), dtype=dtype, channels_last=False)
        (y, *_), gradients = last.run(batch_norm, views=2, eps=EPS, relu=True)
        (other_y, *_), other_gradients = first.run(batch_norm, views=2, eps=EPS, relu=True)
        assert first.x.is_contiguous()
        assert other_y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, other_y)
        assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    # An expanded gradient, like that of a mean over positions.
    problem = Problem((6, 20, 5, 4))
    problem.dy = torch.randn(6, 20, 1, 1).expand(6, 20, 5, 4)
    _, gradients = problem.run(batch_norm, views=2, eps=EPS, relu=True)
    _, exact = problem.exact(2, True)
    assert max(error(*pair) for pair in zip(gradients, exact, strict=True)) < 1e-5


def test_cpu_uses_numba_for_float32_and_bfloat16_only(monkeypatch):
    used = []
    monkeypatch.setattr(cpu, "compute_moments", lambda x, *rest: used.append(x.dtype) or 1 / 0)
    x = torch.ones(2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            batch_norm(x.to(dtype), None, torch.ones(3), torch.ones(3), views=1, eps=EPS, relu=False)
    w = torch.ones(3, dtype=torch.float64)
    batch_norm(x.double(), None, w, w, views=1, eps=EPS, relu=False)
    batch_norm(x.half(), None, w.float(), w.float(), views=1, eps=EPS, relu=False)
    assert used == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)])
def test_gradients_equal_finite_differences(residual, relu):
    rng = torch.Generator().manual_seed(1)
    x, r = (torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(2))
    w, b = (torch.randn(3, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(2))

    def f(*tensors):
        x, r, w, b = tensors if residual else (tensors[0], None, *tensors[1:])
        return batch_norm(x, r, w, b, views=2, eps=EPS, relu=relu)[0]

    assert torch.autograd.gradcheck(f, (x, r, w, b) if residual else (x, w, b))


def test_gradients_only_where_required():
    problem = Problem((4, 5, 3, 3))
    for wanted in range(4):
        tensors = [t.detach() for t in problem.tensors()]
        tensors[wanted].requires_grad_()
        y, mean, var = batch_norm(*tensors, views=2, eps=EPS, relu=True)
        assert not mean.requires_grad
        assert not var.requires_grad
        y.backward(problem.dy)
        assert [t.grad is not None for t in tensors] == [k == wanted for k in range(4)]
        _, exact = problem.exact(2, True)
        assert error(tensors[wanted].grad, exact[wanted]) < 1e-5


def saved_by(residual, relu, grad=True):
    """Return the shapes of the tensors that the graph saves."""
    saved = []
    problem = Problem((4, 5, 3, 3), residual=residual)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.set_grad_enabled(grad),
    ):
        y, _, _ = batch_norm(*problem.tensors(), views=2, eps=EPS, relu=relu)
    assert y.requires_grad == grad
    return [tuple(t.shape) for t in saved]


def test_tensors_saved_for_backward():
    x, stats = (4, 5, 3, 3), (6, 2, 5)
    assert saved_by(False, True) == saved_by(False, False) == saved_by(True, False) == [x, stats]
    assert saved_by(True, True) == [x, x, stats]
    assert saved_by(True, True, grad=False) == []


def test_bit_identical_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for shape in ((8, 40, 24, 24), (64, 1500)):
                for dtype in (torch.float32, torch.bfloat16):
                    assert cpu.split_into_blocks(torch.Size(shape), 2)[1] > 3
                    outputs, gradients = Problem(shape, dtype=dtype).run(batch_norm_cpu, views=2, eps=EPS, relu=True)
                    results.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    one, two, three = results[:4], results[4:8], results[8:]
    for a, b, c in zip(one, two, three, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_propagate(f, dtype, poison):
    """A value that is not finite makes its view's channel NaN, and nothing else."""
    for index in ((0, 2, 0, 0), (1, 2, 1, 3), (3, 19, 4, 4)):
        problem = Problem((4, 20, 5, 5), dtype=dtype)
        problem.x[index] = poison
        (y, mean, var), gradients = problem.run(f, views=2, eps=EPS, relu=True)
        expected = torch.zeros(2, 20, dtype=torch.bool)
        expected[index[0] // 2, index[1]] = True
        assert torch.equal(var.isnan(), expected)
        assert torch.equal(~mean.isfinite(), expected)
        everywhere = expected.repeat_interleave(2, 0)[:, :, None, None].expand(4, 20, 5, 5)
        assert torch.equal(y.isnan(), everywhere)
        assert torch.equal(gradients[0].isnan(), everywhere)
    problem = Problem((4, 20, 5, 5), dtype=dtype)
    problem.residual[1, 3, 2, 2] = torch.nan
    (y, _, _), _ = problem.run(f, views=2, eps=EPS, relu=True)
    assert y.isnan().nonzero().tolist() == [[1, 3, 2, 2]]


@pytest.mark.parametrize(
    "by_instruction",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not HAS_BFLOAT16_CONVERSION, reason="the processor has no such instruction")
        ),
    ],
)
def test_bfloat16_rounding_equals_torch(by_instruction):
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (1 << 16,), generator=rng, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.arange(0x3F80, 0x4080, dtype=torch.int32).mul(0x10000).add(0x8000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1.0])
    x = torch.cat([x, ties, special])
    if by_instruction:
        x[x.abs() < 2e-38] = 0  # the instruction flushes denormals
    x = x[: len(x) // LANES * LANES]
    out = torch.empty(len(x), dtype=torch.bfloat16)
    kernel = round_by_instruction if by_instruction else round_by_integers
    openmp.run(kernel, 1, (x.data_ptr(), out.data_ptr(), len(x)))
    expected = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7).view(torch.int16), expected.nan_to_num(7).view(torch.int16))


def _make_round(by_instruction):
    """Return an intrinsic f(x, out, index) that rounds one vector."""

    @intrinsic
    def round_vector(typing_context, x, out, index):
        def generate(context, builder, signature, arguments):
            x, out, index = arguments
            value = load_vector(builder, x, index, LANES, bfloat16=False)
            value = round_bfloat16(builder, value, by_instruction=by_instruction)
            pointer = builder.gep(builder.inttoptr(out, ir.IntType(16).as_pointer()), [index])
            builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return round_vector


_by_integers, _by_instruction = _make_round(False), _make_round(True)


# Not cached: numba would not notice a change of intrinsics.py.
@openmp.kernel(cache=False)
def round_by_integers(task, args):
    for index in range(0, args[2], LANES):
        _by_integers(args[0], args[1], index)


@openmp.kernel(cache=False)
def round_by_instruction(task, args):
    for index in range(0, args[2], LANES):
        _by_instruction(args[0], args[1], index)


# --- synchronized statistics ---


class Ranks:
    """Two ranks as two threads; `mean` is their differentiable reduce."""

    def __init__(self):
        self._barrier, self._held = threading.Barrier(2, timeout=60), {}
        self.calls = 0
        ranks = self

        class Mean(torch.autograd.Function):
            @staticmethod
            def forward(ctx, t):
                return ranks.exchange(t)

            @staticmethod
            def backward(ctx, gradient):
                return ranks.exchange(gradient)

        self.mean = Mean.apply

    def exchange(self, t):
        self.calls += 1
        self._held[threading.get_ident()] = t.detach().clone()
        self._barrier.wait()
        result = sum(self._held[k] for k in sorted(self._held)) / 2
        self._barrier.wait()
        return result


@pytest.mark.parametrize("f", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronized_statistics_equal_those_of_one_batch(f, dtype):
    mean_of_x = 100 if dtype == torch.float32 else 5  # in float32 m^2 would cancel the last digits of s2
    whole = Problem((12, 19, 4, 3), dtype=dtype, mean=mean_of_x)
    (y, mean, var), gradients = whole.run(f, views=2, eps=EPS, relu=True)
    # Each rank has half of every view's six images.
    rows = [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    ranks = Ranks()
    parts = [Problem((12, 19, 4, 3), dtype=dtype, mean=mean_of_x) for _ in range(2)]
    for part, kept in zip(parts, rows, strict=True):
        part.x, part.residual, part.dy = part.x[kept], part.residual[kept], part.dy[kept]

    def run(part):
        return part.run(f, views=2, eps=EPS, relu=True, reduce=ranks.mean)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, parts))
    assert ranks.calls == 4  # one in forward and one in backward, on each rank
    bound = 2e-5 if dtype == torch.float32 else 2**-7
    for (part_y, part_mean, part_var), part_gradients in results:
        kept = rows.pop(0)
        assert error(part_mean, mean.double()) < 1e-6
        assert error(part_var, var.double()) < 1e-5
        assert error(part_y, y[kept].double()) < bound
        assert error(part_gradients[0], gradients[0][kept].double()) < bound
        assert error(part_gradients[1], gradients[1][kept].double()) < bound
    for k in (2, 3):  # the gradients of weight and bias are local sums
        assert error(sum(r[1][k] for r in results), gradients[k].double()) < 2e-5
    assert not torch.allclose(results[0][1][2], results[1][1][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_output_can_be_modified_in_place(dtype):
    problem = Problem((4, 3, 2, 2), dtype=dtype, residual=False)

    def chain(*tensors, **options):
        return F.silu(batch_norm(*tensors, **options)[0], inplace=True)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    options = {"views": 2, "eps": EPS, "relu": False}
    (y,), gradients = problem.run(compiled, **options)
    (expected,), exact = problem.run(chain, **options)
    assert error(y, expected.double()) < 1e-2
    assert all(error(*pair) < 2e-2 for pair in zip(gradients, exact, strict=True))


def test_torch_compile_has_no_graph_break():
    problem = Problem((4, 3, 2, 2))
    compiled = torch.compile(batch_norm, fullgraph=True, backend="aot_eager")
    for tensors in (problem.tensors(), [t if t is None else t.detach() for t in problem.tensors()]):
        results = [f(*tensors, views=2, eps=EPS, relu=True) for f in (compiled, batch_norm)]
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(*results, strict=True))
        assert not results[0][1].requires_grad


C = 3
GOOD = {
    "x": torch.ones(4, C, 2, 2),
    "residual": torch.ones(4, C, 2, 2),
    "weight": torch.ones(C),
    "bias": torch.ones(C),
    "views": 2,
    "eps": EPS,
    "relu": True,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": 3}, r"4 rows of x \(4, 3, 2, 2\) do not divide into 3 views"),
        ({"views": 0}, "into 0 views"),
        ({"x": torch.ones(4, C, 2)}, r"not \(4, 3, 2\)"),
        ({"x": torch.ones(0, C, 2, 2), "residual": None}, "not empty"),
        ({"x": torch.ones(4, C, 2, 2, dtype=torch.int32), "residual": None}, "torch.int32"),
        ({"residual": torch.ones(4, C, 2, 3)}, r"residual is \(4, 3, 2, 3\)"),
        ({"residual": torch.ones(4, C, 2, 2).bfloat16()}, "residual is .*bfloat16"),
        ({"weight": torch.ones(C + 1)}, r"weight must be \(3,\) .* not \(4,\)"),
        ({"bias": torch.ones(C).bfloat16()}, "bias must be .*bfloat16"),
    ],
)
def test_mismatched_arguments_raise(change, message):
    batch_norm(**GOOD)
    for f in (batch_norm, batch_norm_reference):
        with pytest.raises(ValueError, match=message):
            f(**GOOD | change)
