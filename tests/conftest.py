"""Seeds, and which tests run where: those marked cuda are skipped, visibly, without a GPU or without kernels for it."""

import random

import pytest
import torch

from dora_ext import _load


def pytest_report_header():
    kernels = f"{_load.origin}, architectures {_load.module.architectures or 'none'}" if _load.module else "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"dora_ext kernels: {kernels}; torch {torch.__version__}; {device}"


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, metavar="N", help="run N parameter sets of each test, always the same")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    if config.getoption("--sample"):
        sample(config, items, config.getoption("--sample"))
    no_cuda = why_no_cuda()
    for item in items:
        if no_cuda and (item.get_closest_marker("cuda") or item.get_closest_marker("multi_gpu")):
            item.add_marker(pytest.mark.skip(reason=no_cuda))
        elif item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))


def sample(config, items, n: int) -> None:
    """For slow instruments, such as compute-sanitizer: what -m and -k leave is thinned out."""
    groups: dict = {}
    for item in items:
        groups.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    drawn = [random.Random(0).sample(group, min(n, len(group))) for group in groups.values()]
    kept = {id(item) for group in drawn for item in group}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if _load.module is not None and not _load.module.architectures:
        return "dora_ext was built without CUDA kernels"
    return None


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """cuDNN rounds float32 to TF32 unless told otherwise, and accelerate has all products rounded from its first
    torch.compile on: that is its user's choice, not an error of ours."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param


@pytest.fixture
def bnb():
    """bitsandbytes; its slow paths go through torch.compile, which would take longer than the tests."""
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: nothing to compare bits with")
    with torch.compiler.set_stance("force_eager"):
        yield module


@pytest.fixture
def peft_switched_off():
    """PEFT's own code before the test and after it, whatever the test switches."""
    import dora_ext.integrations.peft as integration

    integration.disable()
    yield
    integration.disable()
