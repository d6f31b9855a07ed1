"""The benches, by the names that `python -m bench` has for them. Each is a module with KEY (of its results), TITLE,
NAMES (of its rivals), run and table. Where it takes times: label, of a row, and HEADING, what labels list. Where rows
have a floor: work, the least operations and bytes."""

from . import (
    bench_conv,
    bench_decode,
    bench_embedding,
    bench_error,
    bench_forward,
    bench_kernels,
    bench_linear,
    bench_nf4,
)

BENCHES = {
    "linear": bench_linear,
    "conv": bench_conv,
    "embedding": bench_embedding,
    "error": bench_error,
    "nf4": bench_nf4,
    "kernels": bench_kernels,
    "forward": bench_forward,
    "decode": bench_decode,
}
