"""examples/quickstart.ipynb runs from top to bottom in a kernel of its own, and learns what it says."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch

import dora_ext

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def executed():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for needed in ("ipykernel", "matplotlib", "matplotlib_inline"):
        pytest.importorskip(needed)
    with pytest.MonkeyPatch.context() as patch:
        # The kernel is a process of its own: it takes the dora_ext that is tested here, and as many threads.
        paths = [str(Path(dora_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") for output in outputs)


def test_is_valid_and_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def expect_to_have_learned(text: str) -> None:
    documentation, untouched, trained, merged = (float(x) for x in re.findall(r": ([\d.]+) nats a character", text))
    assert documentation < 2.2  # guessing among 128 characters has 4.85
    assert trained < 0.9 * untouched
    assert merged == pytest.approx(trained, abs=2e-3)
    assert float(re.search(r"after merging: (\S+)", text)[1]) < 1e-3


def test_learns_to_read_code(executed):
    expect_to_have_learned(text_of(executed))


@pytest.mark.cuda
def test_cells_run_on_the_gpu(capsys):
    """Without Jupyter, which GPU machines seldom have; what draws is left out where there is no matplotlib."""
    cells = [c["source"] for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    draws = importlib.util.find_spec("matplotlib") is not None
    if draws:
        importlib.import_module("matplotlib").use("Agg")
    names: dict = {}
    for lines in cells:
        source = "".join(line for line in lines if not line.startswith("%"))
        if draws or not re.search(r"plt|figure", source):
            exec(source, names)
    assert names["device"] == "cuda"
    expect_to_have_learned(capsys.readouterr().out)


def test_shows_both_figures_and_the_table(executed):
    pictures = [
        output.data["image/png"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2 and all(len(picture) > 10_000 for picture in pictures)
    assert re.search(r"ΔM +ΔD", text_of(executed))
