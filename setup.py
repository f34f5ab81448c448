"""What pyproject.toml cannot say: a wheel carries the shipped configs as jsurgery/configs, where `config_path` looks."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jsurgery", "jsurgery.*", "pallas_kernels"]), "jsurgery.configs"],
    package_dir={"jsurgery.configs": "configs"},
)
