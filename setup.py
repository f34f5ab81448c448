"""What pyproject.toml cannot say: in a wheel, the folders configs/ and export/ are jsurgery.configs, where
`--config=NAME` looks, and jsurgery.export."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["jsurgery", "jsurgery.*", "pallas_kernels"]), "jsurgery.configs"],
    package_dir={"jsurgery.configs": "configs", "jsurgery.export": "export"},
)
