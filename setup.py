"""Puts what the package reads from data/ into a wheel, as mar_mini/_data; the rest: pyproject.toml.

A clone (pip install -e .) goes on with data/ itself.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PATTERNS = (
    "*/*.parquet",
    "*/README.md",
    "reference/*.safetensors",
    "symptoms/*.json",
    "weights/*/*.safetensors",
    "weights/*/README.md",
    "weights/*/config.json",
)


class WithData(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in (path for pattern in PATTERNS for path in Path("data").glob(pattern)):
            copy = Path(self.build_lib, "mar_mini", "_data", path.relative_to("data"))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


setup(cmdclass={"build_py": WithData})
