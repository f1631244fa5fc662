"""Measurements in separate processes.

Few imports, because they count as memory of the measured process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def in_a_process(module: str, *arguments: object, **environment: str) -> Any:
    """Call ``module``'s ``measure`` in a new process, which calls :func:`measure_or_run`."""
    command = [sys.executable, "-m", module, "--measure", json.dumps(arguments)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure_or_run(measure: Callable[..., object], main: Callable[[], object]) -> None:
    """Measure in the process that :func:`in_a_process` started; otherwise run the benchmark."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
