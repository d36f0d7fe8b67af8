"What the plan says of the steps that are measured. Everything that asks `planning.plan` stands in `planned`."

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from . import shapes
import torch
from .record import Checks, Found

FILE = 'planned.json'


@dataclass
class Planned:
    """Of one optimiser step on one device.

    flops: that the model needs
    executed: with layers that are recomputed
    memory: purpose -> GB
    """

    flops: float
    executed: float
    trained: int
    parameters: int
    memory: dict[str, float]


@cache
def counted(paper: str, tiny: bool, checkpointing: bool) -> tuple:
    "Costs of a sample, and the parameters."
    from mllm_replica.planning.plan import stage_cost

    shape = shapes.shape_of(paper, tiny)
    stage = shapes.stage_of(paper, shape.batch, 1)
    costs = stage_cost(lambda: shapes.build(paper, tiny), stage, shape.length, shape.images, checkpointing)
    with torch.device('meta'):
        parameters = sum(p.numel() for p in shapes.build(paper, tiny).parameters())
    return (*costs, parameters)


def planned(paper: str, tiny: bool, checkpointing: bool, sharded: bool) -> Planned:
    "The plan of a step on one device; `sharded` over one process holds the same."
    from mllm_replica.core.machine import Machine
    from mllm_replica.planning.memory import memory_on_device

    plain, again, trained, parameters = counted(paper, tiny, checkpointing)
    batch = shapes.shape_of(paper, tiny).batch
    stage, machine = shapes.stage_of(paper, batch, 1), Machine(checkpointing=checkpointing)
    with torch.device('meta'):
        memory = memory_on_device(shapes.build(paper, tiny), [stage], stage, machine, again.activations)
    flops, executed = ((cost.forward + cost.backward) * batch for cost in (plain, again))
    return Planned(float(flops), float(executed), trained, parameters, memory)


def published_rate(device: str) -> float | None:
    "Dense bf16 TFLOP/s that the maker states; None: of an unknown device."
    from mllm_replica.planning.flops import peak_of

    peak = peak_of(device)
    return peak and peak / 1e12


def key_of(paper: str, checkpointing: bool, sharded: bool) -> str:
    "Name of a step."
    return f'{paper}{", fsdp" * sharded}{", checkpointing" * checkpointing}'


def run(checks: Checks, papers: tuple[str, ...] = shapes.PAPERS) -> None:
    "Count everything, on the CPU and without numbers, while the device works."
    for paper in papers:
        for checkpointing in (False, True):
            for sharded in (False, True):
                name = key_of(paper, checkpointing, sharded)
                checks.run(name, one, checks.folder, name, paper, checks.tiny, checkpointing, sharded)


def one(folder: Path, name: str, paper: str, tiny: bool, checkpointing: bool, sharded: bool) -> Found:
    "One step's plan, kept for those who measure it."
    found = planned(paper, tiny, checkpointing, sharded)
    file = folder / FILE
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {name: asdict(found)}))
    figures = {
        'parameters': (found.parameters, ''),
        'trained': (found.trained, ''),
        'model FLOPs of a step': (found.flops / 1e12, 'TFLOP'),
        'executed': (found.executed / 1e12, 'TFLOP'),
        'memory': (sum(found.memory.values()), 'GB'),
    }
    return Found(figures | {f'memory: {purpose}': (size, 'GB') for purpose, size in found.memory.items()})
