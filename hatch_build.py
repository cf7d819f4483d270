"""Compiles the CPU's kernels for a wheel or an editable install; goes on without them where there is no compiler."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        builder = runpy.run_path(str(Path(self.root) / "hasten" / "ops" / "cpu" / "build.py"))
        library = builder["LIBRARY"]
        library.unlink(missing_ok=True)
        try:
            builder["build"]()
        except (builder["BuildError"], OSError) as e:
            self.app.display_warning(f"Hasten is installed without kernels of its own for the CPU: {e}")
            return
        # what is compiled knows the platform, but neither a Python nor its ABI
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
