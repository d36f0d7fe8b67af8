"What it runs on: names and versions, and the rates that its parts reach."

import contextlib
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .lacking import HELPFUL, NEEDED, THEIR_NAMES, third_party
from .planned import published_rate
from .record import Checks, Found

ROOT = Path(__file__).resolve().parents[2]


def run(checks: Checks) -> None:
    "Names first: without them nothing else is worth much."
    checks.run('what it is', described, checks.device)
    checks.run('rates', rates, checks.device, checks.tiny)


def output(*command: str) -> str | None:
    "What a program prints; None where there is none or it fails."
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
        return done.stdout.strip()


def version_of(name: str) -> str | None:
    "Of an installed package."
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(THEIR_NAMES.get(name, name).replace('_', '-'))


def commit() -> str | None:
    "Of the package, '+' behind it where files differ; None: not known."
    found = os.environ.get('MLLM_REPLICA_COMMIT') or output('git', 'rev-parse', 'HEAD')
    changed = output('git', 'status', '--porcelain', '--untracked-files=no')
    return found and found + '+' * bool(changed)


def described(device: str) -> Found:
    "Device, driver, versions, memory."
    if device == 'cuda' and not torch.cuda.is_available():
        raise RuntimeError('PyTorch finds no CUDA device; `--device cpu --tiny` tries the script without one')
    figures: dict[str, Any] = {'device': platform.processor() or platform.machine(), 'threads': torch.get_num_threads()}
    if device == 'cuda':
        gpu = torch.cuda.get_device_properties(0)
        figures = {
            'device': gpu.name,
            'memory': round(gpu.total_memory / 1e9, 1),
            'capability': f'{gpu.major}.{gpu.minor}',
            'driver': output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
            'published rate': published_rate(gpu.name),
        }
    figures |= {'CUDA': torch.version.cuda, 'cuDNN': str(torch.backends.cudnn.version()), 'cores': os.cpu_count()}
    figures |= {'python': platform.python_version(), 'commit': commit()}
    figures |= {THEIR_NAMES.get(name, name): version_of(name) for name in (*NEEDED, *HELPFUL)}
    units = {'memory': 'GB', 'published rate': 'TFLOP/s, dense bf16'}
    text = f'imported: {", ".join(third_party())}; {sys.executable}'
    return Found({name: (value, units.get(name, '')) for name, value in figures.items()}, detail=text)


def seconds_of(work: Any, device: str, times: int) -> float:
    "Mean seconds of a piece of work after three tries."
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def rates(device: str, tiny: bool) -> Found:
    "Matrix products in bf16 and fp32, and a copy within memory."
    torch.set_float32_matmul_precision('highest')
    size, figures = 128 if tiny else 8192, {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = seconds_of(lambda: a @ b, device, 10)
        figures[f'matrix product, {str(dtype).removeprefix("torch.")}'] = (2 * size**3 / seconds / 1e12, 'TFLOP/s')
    source = torch.empty(2**20 if tiny else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, 10)
    return Found(figures | {'copy, bytes read and written': (2 * source.numel() / seconds / 1e12, 'TB/s')})
