"""Packages: ``mhc_ops`` as it lies, ``csrc_tilelang`` under the name ``mhc_ops.csrc_tilelang``.

Everything else stands in pyproject.toml, which has no way to map one package to another folder.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mhc_ops", "mhc_ops.*"]), "mhc_ops.csrc_tilelang"],
    package_dir={"mhc_ops.csrc_tilelang": "csrc_tilelang"},
    package_data={"mhc_ops": ["py.typed", "_host.cpp"]},
)
