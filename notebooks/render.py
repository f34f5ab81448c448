"""Runs the notebooks beside this file and leaves each as Markdown with its pictures.

python notebooks/render.py FOLDER [NAME ...]
"""

import pathlib
import sys
from collections.abc import Sequence

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

HERE = pathlib.Path(__file__).parent
ACCELERATED = ("06_kaggle_tpu", "07_colab")  # need Wan2.1 and an accelerator: only run where they are named


def without_progress(notebook: NotebookNode) -> NotebookNode:
    """What commands say on the way goes to stderr, and is no result."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def render(path: pathlib.Path, folder: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    pictures = folder / path.stem
    resources = {"output_files_dir": pictures.name}
    text, made = MarkdownExporter().from_notebook_node(without_progress(notebook), resources)
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.iterdir():
        old.unlink()
    for name, content in made["outputs"].items():
        (folder / name).write_bytes(content)
    (folder / f"{path.stem}.md").write_text(text.rstrip() + "\n")


def main(folder: str, names: Sequence[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if path.stem in names or (not names and path.stem not in ACCELERATED):
            render(path, pathlib.Path(folder))
            print(f"{folder}/{path.stem}.md", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
