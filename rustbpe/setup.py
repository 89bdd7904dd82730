"""Builds the Rust core with cargo and packages it as plain data, so that one wheel serves every Python version."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CORE = {"win32": "rustbpe.dll", "darwin": "librustbpe.dylib"}.get(sys.platform, "librustbpe.so")


class BuildWithCore(build_py):
    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # files of an earlier build
        super().run()
        if not shutil.which("cargo"):
            sys.exit("rustbpe is written in Rust: install a toolchain first (cargo 1.70 or newer)")
        built = Path("build", "cargo").absolute()
        subprocess.run(["cargo", "build", "--release", "--offline", "--target-dir", built], check=True)
        package = Path("python" if self.editable_mode else self.build_lib, "rustbpe")
        # cargo may be configured to build for a target, in a folder of its own
        newest = max(built.rglob(f"release/{CORE}"), key=lambda path: path.stat().st_mtime)
        shutil.copy(newest, package / CORE)


class WheelForEveryPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithCore, "bdist_wheel": WheelForEveryPython}, distclass=PlatformDistribution)
