"""The notebook of examples/ runs from top to bottom, and is kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "apt_diffusion.ipynb"

# Runs behind the notebook's own cells: what its rows say of themselves.
CHECK = """
import numpy as np

def difference(first, second):
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())

off, on, alone = draw(apt_scale=0.0), draw(apt_scale=1.0), draw([PROMPTS[0]] * 2)
same = [difference(off[0], base[0]), difference(mixed[0], base[0]), difference(mixed[1], alone[1])]
print("same", max(same) <= 1, "taught", difference(on[0], base[0]) > 5)
"""


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert "%pip install" in cells[0].source  # for a computer that has nothing yet


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_on_a_cpu(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    settings = {"APT_MODEL": "miniature-emoji", "APT_TRAIN_STEPS": "30", "APT_DRAW_STEPS": "4", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, value in {**settings, "PYTHONPATH": path}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if output.output_type == "display_data" and "image/png" in output.data]
    assert len(pictures) == 3  # before, strengths, a mixed batch
    assert outputs[-1].text.split() == ["same", "True", "taught", "True"]  # 1 of 255 is the kernels' rounding
    assert (tmp_path / "out" / "notebook" / "pytorch_apt_weights.safetensors").is_file()
