"""Training steps: GAN, decoder and both, in every precision, eager and compiled.

The literal implementation (``benchmarks/literal.py``) is measured beside them, always eager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import literal, train
from benchmarks.gpu import ceilings
from benchmarks.gpu.device import PRECISIONS, Size, computing_in, precisions
from benchmarks.gpu.timing import free_memory, idle_fraction, measure
from stages.common.runtime import Machine

Step = Callable[[], object]
COLUMNS = (
    "what",
    "precision",
    "implementation",
    "ms",
    "samples_per_s",
    "to_matrix_product",
    "peak_mib",
    "idle",
    "to_literal",
    "problem",
)
KINDS = ("gan", "decoder", "joint")
EAGER, COMPILED, LITERAL = "eager", "compiled", "literal"


def rows(
    device: torch.device, size: Size, *, minutes: float, compiled: bool = True
) -> Iterator[dict[str, Any]]:
    """Measure all steps, the literal ones and the eager ones first.

    No step is begun after ``minutes``.

    Yields
    ------
    dict
        ``ms`` median milliseconds of a step; ``to_matrix_product`` operations a second over those
        of a product of matrices in this precision, 0..1; ``peak_mib`` largest memory in MiB;
        ``idle`` fraction of the step in which the device does nothing, 0..1; ``to_literal`` time
        of the literal step in this precision over this one's; ``problem`` why there is no number.
    """
    deadline = time.monotonic() + 60 * minutes
    limits = {name: ceilings.matmul_tflops(device, size, name) for name in precisions(device)}
    plan = [(kind, name, how) for name in limits for kind in KINDS for how in (LITERAL, EAGER)]
    if compiled:  # bf16 first, which most GPUs compute fastest
        order = sorted(limits, key=lambda name: name != "bf16")
        plan += [(kind, name, COMPILED) for name in order for kind in KINDS]
    operations: dict[tuple[str, str], float] = {}
    literal_ms: dict[tuple[str, str], float] = {}
    for kind, precision, how in plan:
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"what": kind, "precision": precision, "implementation": how}
        if time.monotonic() > deadline:
            yield {**row, "problem": "not run: out of time"}
            continue
        try:
            row |= one_row(device, size, kind, precision, how, operations)
        except torch.cuda.OutOfMemoryError:
            row["problem"] = "out of memory"
        except Exception as error:
            if how != COMPILED:
                raise
            # Compilers fail in many ways; the other rows are still worth having.
            row["problem"] = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        free_memory(device)
        if row["ms"]:
            if how == LITERAL:
                literal_ms[kind, precision] = row["ms"]
            if count := operations[kind, how]:
                row["to_matrix_product"] = count / row["ms"] / 1e9 / limits[precision]
            if plain := literal_ms.get((kind, precision)):
                row["to_literal"] = plain / row["ms"]
        yield row


def one_row(
    device: torch.device,
    size: Size,
    kind: str,
    precision: str,
    how: str,
    operations: dict[tuple[str, str], float],
) -> dict[str, Any]:
    """Measure one step; its operations are counted in the first precision of each."""
    with computing_in(precision):
        step = build(device, size, kind, precision, how)
        if how == COMPILED:  # the same operations; compiled code cannot be counted
            operations[kind, how] = operations.get((kind, EAGER), 0.0)
        elif (kind, how) not in operations:
            with FlopCounterMode(display=False) as counter:
                step()
            operations[kind, how] = counter.get_total_flops()
        timing = measure(step, device, size.seconds)
        return {
            "ms": timing.ms,
            "samples_per_s": 1000 * size.training.batch / timing.ms,
            "peak_mib": timing.peak_mib,
            "idle": idle_fraction(step, device, timing.ms),
        }


def build(device: torch.device, size: Size, kind: str, precision: str, how: str) -> Step:
    """Build a step: ``gan``, ``decoder``, or ``joint`` with one generated sample a mask."""
    features, masks = train.draw_batch(size.training, device)
    mixed = PRECISIONS[precision]
    if how == LITERAL:
        if kind == "decoder":
            decoder = train.new_decoder(size.training).to(device)
            training = literal.DecoderTraining(decoder)
            autocast = train.literal_autocast(device, precision)
            return lambda: training.step(features.float(), masks, autocast)
        steps = train.literal_steps(size.training, device.type, mixed, features, masks)
    else:
        machine = Machine(device=device.type, compile=how == COMPILED)
        arguments = (size.training, device.type, mixed, features, masks, machine)
        if kind == "decoder":
            return train.our_decoder_step(*arguments)
        steps = train.our_steps(*arguments)
    return steps["gan step" if kind == "gan" else "joint step 1:1"]
