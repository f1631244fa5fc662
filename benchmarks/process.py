"""Measuring in a process of its own; light, because its imports would count as the measured process's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def in_a_process(module: str, *arguments: Any, **environment: str) -> Any:
    """What ``module``'s ``measure`` returns for JSON-ready arguments, in a process of its own: see :func:`answer`."""
    command = [sys.executable, "-m", module, "--measure", json.dumps(arguments)]
    run = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def answer(measure: Callable[..., Any], main: Callable[[], Any]) -> None:
    """Be the process that :func:`in_a_process` started, or run the benchmark."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
