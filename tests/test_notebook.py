"""The notebook, run from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_no_outputs_are_stored():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)


def test_it_opens_in_colab():
    badge = "https://colab.research.google.com/github/"
    assert f"({badge}" in "".join(cells()[0]["source"])
    assert "/notebooks/quickstart.ipynb)" in "".join(cells()[0]["source"])


@pytest.mark.model
def test_every_cell_runs(smollm2, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("AWQ_JAX_NOTEBOOK_MODEL", str(smollm2))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={}).execute()
    shown = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell.cell_type == "code"}
    kinds = {output["output_type"] for outputs in shown.values() for output in outputs}
    assert "error" not in kinds
    text = {id: "".join(o.get("text", "") for o in outputs) for id, outputs in shown.items()}
    assert text["install"] == ""
    assert "MB after" in text["quantize"]
    assert [o["output_type"] for o in shown["report"]] == ["display_data"]
    assert "same top-1" in text["compare"]
    assert text["answer"].lower().count("sky") >= 2
    assert text["own"].count("rounded to nearest") == 2
