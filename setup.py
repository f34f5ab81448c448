"""What pyproject.toml cannot say: a wheel carries configs/ as jsurgery/configs, where `--config=NAME` looks."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jsurgery", "jsurgery.*", "pallas_kernels"]), "jsurgery.configs"],
    package_dir={"jsurgery.configs": "configs"},
)
