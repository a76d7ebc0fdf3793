"""The analysis answers at once: it never imports torch, and draws only when asked."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import vlmlab.analyse


def test_no_module_imports_torch_or_matplotlib() -> None:
    names = [f"vlmlab.analyse.{module.name}" for module in pkgutil.iter_modules(vlmlab.analyse.__path__)]
    assert {"vlmlab.analyse.sweep", "vlmlab.analyse.report", "vlmlab.analyse.table"} <= set(names)
    heavy = "[name for name in ('torch', 'matplotlib', 'lightning', 'scipy') if name in sys.modules]"
    code = f"import sys, {', '.join(names)}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
