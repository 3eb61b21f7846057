"""Drives CMake for the extension, and makes the page of the package index; the rest is in
pyproject.toml and CMakeLists.txt.

GLM4_EXTENSION=0 installs without the extension: no int4 and int8, and on a CPU PyTorch references
in place of the kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*")))]
WITHOUT = "or install without the extension (GLM4_EXTENSION=0): no int4 and int8, slow on a CPU"


class ExtensionFirst(build):
    """So that what stops it stands alone, not below a page of copied files."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise SystemExit(
                "glm4-kernels: no C++ compiler found; install one (Debian: apt-get install g++) "
                f"and run the same command again, {WITHOUT}"
            )
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{folder}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
        ]
        if self.force:
            configure.append("--fresh")
        for command in (configure, ["cmake", "--build", folder, "--parallel", jobs]):
            if status := subprocess.run(command).returncode:
                raise SystemExit(
                    f"glm4-kernels: the extension could not be built: cmake ended with {status}, "
                    f"its own words stand above; repair that, {WITHOUT}"
                )


def page() -> str:
    """README.md where its files do not lie beside it: links into the tree become plain text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"`\1`", text)


extension = Extension("glm4_kernels._C", sources=[], depends=SOURCES)
setup(
    ext_modules=[] if os.environ.get("GLM4_EXTENSION") == "0" else [extension],
    cmdclass={"build": ExtensionFirst, "build_ext": CMakeBuild},
    long_description=page(),
    long_description_content_type="text/markdown",
)
