"""Saving an adapter: whole or not at all."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from adapter_cases import Net, move

from dora_ext.adapter import WEIGHTS_NAME, adapter_parameters, save_adapter
from dora_ext.injection import inject

pytest.importorskip("safetensors.torch")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_save_without_layers(net, tmp_path):
    with pytest.raises(ValueError, match="no DoRA layer"):
        save_adapter(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_into_a_file(net, tmp_path):
    target = tmp_path / "file"
    target.write_text("mine")
    with pytest.raises(OSError):
        save_adapter(inject(net, ["up"], r=2), target)
    assert target.read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, where not even root can make a folder")
def test_save_where_no_folder_can_be(net):
    with pytest.raises(OSError):
        save_adapter(inject(net, ["up"], r=2), "/proc/adapter")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_save_into_unwritable_folder(net, tmp_path):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError):
            save_adapter(move(net), tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert contents(tmp_path) == before


def test_others_may_read_as_the_umask_says(net, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    assert (tmp_path / WEIGHTS_NAME).stat().st_mode == plain.stat().st_mode


def test_failed_replacement_leaves_no_litter(net, tmp_path, monkeypatch):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)

    def refuse(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        save_adapter(move(net), tmp_path)
    assert contents(tmp_path) == before


def test_full_disk_leaves_old_files(net, tmp_path):
    save_adapter(inject(net, ["up"], r=2), tmp_path)
    before = contents(tmp_path)
    # A limit on a file's size stands in for a full disk: writing stops in the middle with an OSError.
    script = textwrap.dedent(f"""
        import resource, torch
        from torch import nn
        from dora_ext.adapter import save_adapter
        from dora_ext.injection import inject
        model = inject(nn.Sequential(nn.Linear(512, 512)), r=64)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_adapter(model, {str(tmp_path)!r})
        except OSError as error:
            print("refused:", error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert contents(tmp_path) == before


def test_partitioned_parameters_are_refused(net, tmp_path):
    inject(net, ["up"], r=2)
    layer = net.blocks[0]["up"]
    next(iter(adapter_parameters(layer).values())).data = torch.empty(0)
    with pytest.raises(ValueError, match="gather"):
        save_adapter(net, tmp_path)
    assert not list(tmp_path.iterdir())
