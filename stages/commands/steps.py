"""Steps of `auto`: commands of this program in a project's folder, each done once."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from featurestore import fingerprint
from featurestore.files import file_sha256, write_atomically
from stages.commands.doctor import default_config
from stages.commands.options import load_preset
from stages.commands.params import PARAMS, READ, as_yaml, fitting_repeats
from stages.common.config import Plain, parse, read_params, with_settings
from stages.common.runtime import write_json
from stages.common.sources import ROOT

STATE = "auto.json"


class Steps:
    """Runs commands of this program in a project's folder, and remembers which have finished."""

    def __init__(self, ctx: click.Context, out: Path, budget: float) -> None:
        self.ctx, self.out, self.budget = ctx, out, budget
        out.mkdir(parents=True, exist_ok=True)
        state = json.loads((out / STATE).read_text("utf-8")) if (out / STATE).exists() else {}
        self._done: dict[str, str] = state.get("done", {})  # inputs of finished steps, by command
        self._before, self._start = state.get("seconds", 0.0), time.monotonic()

    @property
    def seconds(self) -> float:
        """Time used, of earlier calls too."""
        return float(self._before) + time.monotonic() - self._start

    def left(self) -> float:
        """Return the seconds of the budget that are left, at least 0."""
        return max(0.0, self.budget - self.seconds)

    def run(self, command: str, *arguments: str, once: bool = False) -> None:
        """Print and run a command; exit with its code if it fails.

        ``once``: skip a finished command while features and parameters are unchanged.
        """
        written = shlex.join([command, *arguments])
        key, inputs = _name(command, arguments), self._inputs() if once else ""
        if once and self._done.get(key) == inputs:
            click.echo(f"$ python pipeline.py {written}   # done before")
            return
        click.echo(f"$ python pipeline.py {written}")
        code = subprocess.run(
            [sys.executable, str(ROOT / "pipeline.py"), command, *arguments],
            cwd=self.out,
            check=False,
        ).returncode
        if once and code == 0:
            self._done[key] = self._inputs()  # `choose` changes the parameters
        write_json(self.out / STATE, {"seconds": self.seconds, "done": self._done})
        if code:
            click.echo(f"{command} failed; mend what it says and run the same command", err=True)
            self.ctx.exit(code)

    def _inputs(self) -> str:
        """Return what a step's result depends on beside its arguments."""
        stores = sorted((self.out / "features").glob("*/index.json"))
        params = self.out / "params.yaml"
        return fingerprint(
            params=params.read_text("utf-8"),
            stores=[file_sha256(store) for store in stores],
        )

    def write_params(self, preset: str, root: Path) -> None:
        """Write params.yaml from a preset, unless an earlier call has."""
        path = self.out / "params.yaml"
        if path.exists():
            return
        found = default_config(root)
        changes: dict[str, object] = {
            "prepare.dataset": found.dataset,
            "prepare.root": found.root,
            "prepare.split": found.split,
        }
        if (root / "unlabelled").is_dir():
            changes["prepare.unlabelled"] = "unlabelled"
        changes |= {"compare.variants": ["baseline"], "compare.gan_variants": []}
        changes["compare.generators"] = []
        self._write(with_settings(load_preset(preset).plain(), {**changes, "compare.seeds": [0]}))

    def fit_to_images(self) -> None:
        """Repeat few images, so that an epoch has enough steps; only before a choice is made."""
        summary = json.loads((self.out / "dataset" / "summary.json").read_text("utf-8"))
        repeats = fitting_repeats(summary["splits"]["train"]["images"])
        plain = read_params(self.out / "params.yaml")
        if "chosen" not in plain["variants"]:
            changes = {"train_gan.repeats": repeats, "train_decoder.repeats": repeats}
            self._write(with_settings(plain, changes))

    def _write(self, plain: Plain) -> None:
        text = as_yaml(parse(PARAMS, plain), "# Written by `python pipeline.py auto`")
        write_atomically(self.out / "params.yaml", text.encode())

    def variants(self) -> dict[str, list[str]]:
        """Name the variants that are compared, by the list of section ``compare``."""
        compare = read_params(self.out / "params.yaml")["compare"]
        return {key: compare[key] for key in READ}


def _name(command: str, arguments: Sequence[str]) -> str:
    """Name a step by its command, and the variant that it trains."""
    return " ".join([command, *(arguments[:2] if command == "train-decoder" else ())])
