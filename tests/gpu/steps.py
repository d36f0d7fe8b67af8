"""Training steps through the house's own loop, with and without sharding and checkpointing: tokens a second, how much of
the device's rate the model's FLOPs reach, and peak memory. One process; sharded, it holds the only share."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from . import shapes
import torch
from .planned import key_of
from .record import Checks, Found
from torch import nn

from mllm_replica.core.machine import Machine
from mllm_replica.data.packing import collate
from mllm_replica.models.assembly import types_of
from mllm_replica.training.loop import train
from mllm_replica.training.sharding import blocks_of, mesh_of, shard

WARM, TIMED = 2, 5  # steps
ALIKE = 0.02  # losses of several ways to make the same step in bf16
PLAIN: dict[str, list[float]] = {}  # paper -> losses of the first way that ran


class Enough(Exception):
    "The steps that are timed are done: the checkpoint at the end of a stage is not what is measured."


@dataclass
class Steps:
    """What was measured.

    seconds: of each step; the first are warm-up
    peak: bytes, most that was allocated; None on a CPU
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def step(self) -> float:
        "Median seconds of a step after the warm-up."
        return median(self.seconds[WARM:])


def run(checks: Checks, papers: tuple[str, ...] = shapes.PAPERS) -> None:
    "Each paper: plain, with checkpointing, sharded, both; then the compiled step."
    for paper in papers:
        for sharded in (False, True):
            for checkpointing in (False, True):
                name = key_of(paper, checkpointing, sharded)
                given = (paper, checks.tiny, checks.device, checks.folder, sharded, checkpointing)
                checks.run(name, one, *given, budget=12)


def model_of(paper: str, tiny: bool, device: str) -> nn.Module:
    "Drawn on the device: fp32 what trains, bf16 what is frozen."
    with torch.device(device):
        model = shapes.build(paper, tiny)
    types = types_of(model, [shapes.stage_of(paper, 1, 1)])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    return model


@contextmanager
def alone(device: str) -> Iterator[None]:
    "A group of this one process, as long as it is needed."
    backend = 'nccl' if device == 'cuda' else 'gloo'
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shard_alone(model: nn.Module, paper: str, device: str) -> nn.Module:
    "As the loop does it among several processes, here over one."
    return shard(model, mesh_of(Machine(shard='fsdp'), device, 1), [shapes.stage_of(paper, 1, 1)])


def timed(model: nn.Module, paper: str, tiny: bool, device: str, folder: Path, machine: Machine) -> Steps:
    "A few steps of the loop; samples are ready, so that the loader is not measured."
    shape, found, last = shapes.shape_of(paper, tiny), Steps(), WARM + TIMED
    samples = shapes.samples_of(model.config, shape, shape.batch)
    shutil.rmtree(folder / 'run', ignore_errors=True)
    clock = time.perf_counter()

    def progress(done: int, total: int, loss: float) -> None:
        "Note the time of a step, which has waited for the device."
        nonlocal clock
        now = time.perf_counter()
        found.seconds.append(now - clock)
        found.losses.append(loss)
        clock = now
        if done == last:
            raise Enough

    if device == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = shapes.stage_of(paper, shape.batch, last + 1)
    try:
        train(
            model,
            [stage],
            {'a': samples},
            partial(collate, pad_token_id=0),
            folder / 'run',
            0,
            progress,
            machine=machine,
        )
    except Enough:
        pass
    found.peak = torch.cuda.max_memory_allocated() if device == 'cuda' else None
    return found


def one(paper: str, tiny: bool, device: str, folder: Path, sharded: bool, checkpointing: bool) -> Found:
    "One way to make a step."
    model, shape = model_of(paper, tiny, device), shapes.shape_of(paper, tiny)
    machine = Machine(shard='fsdp' if sharded else 'none', checkpointing=checkpointing)
    with alone(device) if sharded else nullcontext():
        if sharded:
            shard_alone(model, paper, device)
        found = timed(model, paper, tiny, device, folder, machine)
    figures = {
        'samples of a step': (shape.batch, ''),
        'positions of a sample': (shape.length, ''),
        'step': (found.step, 's'),
        'tokens': (shape.batch * shape.length / found.step, 'a second'),
        'peak memory': (None if found.peak is None else found.peak / 1e9, 'GB'),
    }
    plain = PLAIN.setdefault(paper, found.losses)
    apart = max(abs(a - b) / abs(b) for a, b in zip(found.losses, plain))
    figures['losses, difference to the first of these'] = (apart, 'relative')
    return Found(figures, apart <= ALIKE, f'losses as in the first way to make a step, to {ALIKE:.0%}')


def run_compiled(checks: Checks, paper: str = 'honeybee') -> None:
    "A compiled step of one paper's model."
    given = (paper, checks.tiny, checks.device, checks.folder)
    checks.run(f'{paper}, blocks compiled', compiled, *given, budget=40)


def compiled(paper: str, tiny: bool, device: str, folder: Path) -> Found:
    "Every block compiled by itself, as long models are; the losses are those of the plain step."
    plain = timed(model_of(paper, tiny, device), paper, tiny, device, folder, Machine())
    model = model_of(paper, tiny, device)
    if device != 'cuda':  # where inductor takes minutes
        for block in blocks_of(model):
            block.compile(backend='aot_eager')
    found = timed(model, paper, tiny, device, folder, Machine(compile=device == 'cuda'))
    apart = max(abs(a - b) / abs(b) for a, b in zip(found.losses, plain.losses))
    figures = {
        'step, compiled': (found.step, 's'),
        'step, plain': (plain.step, 's'),
        'faster': (plain.step / found.step, '×'),
        'first step, compiling': (found.seconds[0], 's'),
        'peak memory': (None if found.peak is None else found.peak / 1e9, 'GB'),
        'losses, difference': (apart, 'relative'),
    }
    return Found(figures, apart <= ALIKE, f'losses of the plain step, to {ALIKE:.0%}')
