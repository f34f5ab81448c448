"""In a checkout, the package `export/` that lies beside this one. A wheel has that package in this very place."""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "export")]
