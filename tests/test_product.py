"""torch.ops.dora_ext.hopper_product: each case is an edge of a tile, of the ring of stages or of what the TMA takes."""

import pytest
import torch

import dora_ext  # noqa: F401, registers the ops
from dora_ext.testing import relative_error

product = torch.ops.dora_ext.hopper_product
fits = torch.ops.dora_ext.hopper_product_fits
HALVES = {torch.bfloat16: 2**-9, torch.float16: 2**-12}  # one rounding, on average somewhat less

on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not on_hopper, reason="needs a GPU of compute capability 9.0")
pytestmark = pytest.mark.cuda

# (rows, columns, inner, tail)
SHAPES = [
    pytest.param(1, 8, 8, 0, id="smallest"),
    pytest.param(1, 8, 8, 8, id="smallest tail"),
    pytest.param(128, 256, 64, 0, id="one stage"),
    pytest.param(64, 128, 256, 0, id="half of a block's rows"),
    pytest.param(256, 256, 640, 16, id="once round the ring, and on"),
    pytest.param(300, 264, 200, 8, id="edges everywhere"),
    pytest.param(77, 1000, 520, 24, id="two rests"),
    pytest.param(513, 2056, 96, 512, id="more tail than anything"),
    pytest.param(1000, 776, 1032, 136, id="tail of three stages"),
    pytest.param(2048, 4096, 72, 16, id="wide tiles, two rounds"),
    pytest.param(4100, 1032, 136, 40, id="narrow tiles, three rounds"),
    pytest.param(16500, 1032, 64, 0, id="many groups of rows, the last one short"),
]


def matrix(rows, columns, dtype, pad=8):
    """Random, in rows that lie apart, with NaN between and after them."""
    t = torch.full((rows + 1, columns + pad), float("nan"), dtype=dtype, device="cuda")
    t[:rows, :columns] = torch.randn(rows, columns, device="cuda")
    return t[:rows, :columns]


class Case:
    def __init__(self, rows, columns, inner, tail=0, dtype=torch.bfloat16, transposed=False, factors=False, pad=8):
        right = (lambda k: (k, columns)) if transposed else (lambda k: (columns, k))
        self.left, self.right = matrix(rows, inner, dtype, pad), matrix(*right(inner), dtype, pad)
        self.tails = (matrix(rows, tail, dtype, pad), matrix(*right(tail), dtype, pad)) if tail else (None, None)
        # From 4 bytes off: a view may start anywhere.
        self.gain = torch.randn(columns + 1, device="cuda")[1:] if factors else None
        self.bias = torch.randn(columns + 1, device="cuda")[1:] * inner**0.5 if factors else None
        self.transposed = transposed

    def product(self):
        return product(self.left, self.right, *self.tails, self.gain, self.bias, self.transposed)

    def fits(self):
        return fits(self.left, self.right, *self.tails, self.transposed)

    def expected(self, rows=slice(None)):
        straight = (lambda t: t.double()) if self.transposed else (lambda t: t.double().t())
        result = self.left[rows].double() @ straight(self.right)
        if self.tails[0] is not None:
            result += self.tails[0][rows].double() @ straight(self.tails[1])
        if self.gain is not None:
            result = result * self.gain.double() + self.bias.double()
        return result


def expect(got, case, dtype=torch.bfloat16):
    assert got.dtype == dtype and got.is_contiguous()
    assert relative_error(got, case.expected()) <= HALVES[dtype] * (1 if got.numel() >= 1000 else 2)


def expect_same_bits_twice(results):
    """Of `results`, a function that gives a tuple of them."""
    first = results()
    for _ in range(5):
        assert all(map(torch.equal, results(), first))


def expect_same_bits_where_multiprocessors_are_held(results):
    """Beside a kernel that holds them, clusters come late and find their work taken by those that are there."""
    expected, long = results(), torch.randn(8192, 8192, device="cuda")
    holding, *streams = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(holding):
        long @ long
    got = []
    for stream in streams * 5:  # two at once, each with a part of the GPU
        with torch.cuda.stream(stream):
            got.append(results())
    torch.cuda.synchronize()
    assert all(all(map(torch.equal, each, expected)) for each in got)


@hopper
@pytest.mark.parametrize(("rows", "columns", "inner", "tail"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_values(rows, columns, inner, tail, transposed, factors, dtype):
    case = Case(rows, columns, inner, tail, dtype, transposed, factors)
    assert case.fits()
    torch.full(case.expected().shape, float("nan"), dtype=dtype, device="cuda")  # what the result may be made of
    expect(case.product(), case, dtype)


@hopper
@pytest.mark.parametrize("absent", ["gain", "bias"])
def test_gain_or_bias_alone(absent):
    case = Case(200, 136, 72, 16, factors=True)
    setattr(case, absent, None)
    got = case.product()
    setattr(case, absent, torch.full((136,), 1.0 if absent == "gain" else 0.0, device="cuda"))
    expect(got, case)


@hopper
def test_matrices_of_any_pitch():
    """Contiguous, far apart, and part of another matrix."""
    for pad in (0, 8, 1000):
        case = Case(300, 264, 200, 16, pad=pad, factors=True)
        assert case.fits()
        expect(case.product(), case)
    both = matrix(300, 512, torch.bfloat16)
    case.left, case.tails = both[:, :200], (both[:, 400:416], case.tails[1])
    expect(case.product(), case)


@hopper
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(2048, 4096, 1024, 16), (600, 1000, 520, 24)], ids=str)
def test_same_bits_twice(shape, transposed):
    case = Case(*shape, transposed=transposed, factors=True)
    first = case.product()
    assert all(torch.equal(case.product(), first) for _ in range(5))


@hopper
def test_is_captured_and_replayed():
    case = Case(600, 1000, 520, 24, factors=True)
    case.product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.product()
    case.left.mul_(-3)
    case.gain.mul_(0.5)
    graph.replay()
    expect(result, case)


@hopper
def test_tiles_taken_when_free_give_what_a_captured_product_gives():
    """Products of all sizes follow one another on two streams at once, and beside one that holds many multiprocessors
    for long. The bits are those of a captured product, whose tiles are dealt out beforehand."""
    cases = [Case(*shape, 16, factors=True) for shape in [(4100, 1032, 136), (300, 264, 72), (2048, 4096, 64)]]
    expected = []
    for case in cases:
        case.product()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = case.product()
        graph.replay()
        expected.append(result.clone())
    long = Case(256 * 12, 128, 32768, pad=0)
    *streams, holding = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.stream(holding):
        held = long.product()
    results = []
    for _ in range(4):
        for i, case in enumerate(cases):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append((i, case.product()))
    torch.cuda.synchronize()
    for i, result in results:
        assert torch.equal(result, expected[i]), i
    expect(held, long)


@hopper
def test_runs_on_the_current_stream():
    case = Case(512, 1024, 512, 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        case.left.mul_(2)
        result = case.product()
    torch.cuda.current_stream().wait_stream(stream)
    expect(result, case)


@hopper
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed):
    case = Case(33, 40, 24, 8, transposed=transposed, factors=True)
    args = (case.left, case.right, *case.tails, case.gain, case.bias, transposed)
    torch.library.opcheck(product.default, args)
    torch.library.opcheck(product.default, (case.left, case.right, None, None, None, None, transposed))


@hopper
def test_result_of_2_to_the_31_numbers():
    case = Case(2**20 + 8, 2056, 8, 8, pad=0)
    got = case.product()
    for rows in (slice(0, 300), slice(2**20 - 300, None)):
        assert relative_error(got[rows], case.expected(rows)) <= HALVES[torch.bfloat16]


@hopper
def test_what_fits():
    """What the op refuses is what hopper_product_fits says no to, so that callers can go another way."""
    left, right = matrix(64, 48, torch.bfloat16), matrix(40, 48, torch.bfloat16)
    tail = matrix(64, 16, torch.bfloat16), matrix(40, 16, torch.bfloat16)
    assert fits(left, right) and fits(left, right, *tail) and fits(left[:, 8:], right[:, :40])
    assert not fits(left.float(), right.float())
    for args, message in [
        ((left, right[:36]), "right: expected a multiple of 8 columns"),
        ((left, right[:0]), "right: expected numbers, got none"),
        ((left[:0], right), "left: expected numbers, got none"),
        ((left[:, 1:41], right[:, :40]), "left: expected data on 16 bytes"),
        ((left.new_ones(64, 44), right.new_ones(40, 44)), "left: expected contiguous rows, the next one a multiple"),
        ((left.t().contiguous().t(), right), "left: expected contiguous rows"),
        ((left, right.new_ones(40, 1).expand(40, 48)), "right: expected contiguous rows"),
        ((left, right, tail[0][:, 1:9], tail[1][:, :8]), "left_tail: expected data on 16 bytes"),
        ((left, right, tail[0].contiguous()[:, :8], tail[1].new_ones(40, 9)[:, :8]), "right_tail: expected contiguous"),
    ]:
        assert not fits(*args), message
        with pytest.raises(ValueError, match=f"dora_ext::hopper_product: {message}"):
            product(*args)


def test_bad_arguments_are_refused():
    """The checks come first, on any GPU."""
    left, right = torch.randn(16, 24, device="cuda").bfloat16(), torch.randn(32, 24, device="cuda").bfloat16()
    left_tail, right_tail = left[:, :8].contiguous(), right[:, :8].contiguous()
    tails, gain = (left_tail, right_tail), torch.ones(32, device="cuda")
    for args, error, message in [
        ((left.float(), right), TypeError, "left: expected bfloat16 or float16, got Float"),
        ((left, right.half()), TypeError, "right: expected the dtype of left"),
        ((left, right, left_tail.half(), right_tail), TypeError, "left_tail: expected the dtype of left"),
        ((left, right, left_tail, right_tail.half()), TypeError, "right_tail: expected the dtype of left"),
        ((left[0], right), ValueError, "left: expected 2 dimensions"),
        ((left, right[None]), ValueError, "right: expected 2 dimensions"),
        ((left, right[:, :16]), ValueError, r"right: expected shape \[32, 24\], got \[32, 16\]"),
        ((left, right, None, None, None, None, True), ValueError, r"right: expected shape \[24, 24\], got \[32, 24\]"),
        ((left, right, left_tail), ValueError, "left_tail and right_tail: expected both or neither"),
        ((left, right, left_tail[:8], right_tail), ValueError, r"left_tail: expected shape \[16, 8\], got \[8, 8\]"),
        ((left, right, left_tail, right_tail[:8]), ValueError, r"right_tail: expected shape \[32, 8\], got \[8, 8\]"),
        ((left, right.t(), *tails, None, None, True), ValueError, r"right_tail: expected shape \[8, 32\], got"),
        ((left, right, *tails, gain[1:]), ValueError, r"gain: expected shape \[32\], got \[31\]"),
        ((left, right, *tails, gain, gain[:, None]), ValueError, r"bias: expected shape \[32\]"),
        ((left, right, *tails, gain.double()), TypeError, "gain: expected float32"),
        ((left, right, *tails, gain, gain.half()), TypeError, "bias: expected float32"),
        ((left, right.cpu()), ValueError, "right: expected it on cuda:0 like left, got cpu"),
        ((left, right, left_tail.cpu(), right_tail), ValueError, "left_tail: expected it on cuda:0 like left"),
        ((left, right, *tails, gain.cpu()), ValueError, "gain: expected it on cuda:0 like left"),
    ]:
        with pytest.raises(error, match=f"dora_ext::hopper_product: {message}"):
            product(*args)


@pytest.mark.skipif(on_hopper, reason="needs a GPU of another compute capability than 9.0")
def test_other_gpus_say_no():
    left, right = torch.ones(16, 24, device="cuda").half(), torch.ones(32, 24, device="cuda").half()
    assert not fits(left, right)
    with pytest.raises(ValueError, match="left: expected it on a Hopper GPU"):
        product(left, right)
