"""Builds the Rust core with cargo and packs it as plain data: one wheel serves every Python of a platform."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BUILT, CORE = {
    "win32": ("rustbpe.dll", "core.dll"),
    "darwin": ("librustbpe.dylib", "core.dylib"),
}.get(sys.platform, ("librustbpe.so", "core.so"))


class BuildWithCore(build_py):
    def run(self):
        super().run()
        target = Path(self.build_lib, "rustbpe")
        target.mkdir(parents=True, exist_ok=True)
        folder = Path("build", "cargo").absolute()
        subprocess.run(["cargo", "build", "--release", "--offline", "--target-dir", folder], check=True)
        shutil.copy(folder / "release" / BUILT, target / CORE)


class WheelForEveryPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithCore, "bdist_wheel": WheelForEveryPython}, distclass=PlatformDistribution)
