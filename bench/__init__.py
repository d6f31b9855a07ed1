"""Benchmarks: `python -m bench`. bench_<op>.py times or checks one op; its rivals run in the same process."""
