"""The recorded numbers of the official code, computed on the device: in fp32 within the tests' own bounds (no TF32), and as
training computes, fp32 weights under bf16 autocast, within a looser bound."""

from pathlib import Path
from typing import Any

import torch
from .record import Checks, Found
from torch import Tensor

from mllm_replica.core.registry import cases_of
from mllm_replica.models.parity import Given, Golden, Partial, check, read_golden

GOLDEN = Path(__file__).resolve().parents[1] / 'golden'
PAPERS = ('honeybee', 'owl2', 'mm1', 'eagle', 'owl3')
BF16 = {'out': 0.04, 'grad': 0.12}  # relative error of a tensor, root mean square; on a CPU 0.015 and 0.053 at most
ANSWERS = ('greedy', 'gen_', 'generated')  # after one other token all is other: not compared in bf16


def run(checks: Checks) -> None:
    "Every paper in both types."
    exact()
    for paper in PAPERS:
        checks.run(f'{paper} fp32', single, paper, checks.device, budget=4)
    for paper in PAPERS:
        checks.run(f'{paper} bf16', half, paper, checks.device, budget=4)


def exact() -> None:
    "Products of fp32 in fp32, convolutions by the plain algorithm."
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def golden_of(path: Path, device: str) -> tuple[Golden, Any, str]:
    "A file with its tensors on the device, its cases, and where it is computed: pictures become pixels on the CPU."
    golden, chapter = read_golden(path), cases_of(path.parent.name)
    if not golden.kind:
        golden = golden._replace(kind=chapter.kind_of(set(golden.tensors)))
    if any(tensor.dtype == torch.uint8 for tensor in golden.tensors.values()):
        device = 'cpu'
    return golden._replace(tensors={n: t.to(device) for n, t in golden.tensors.items()}), chapter.parity_cases, device


def files_of(paper: str) -> list[Path]:
    "The recorded files of a paper."
    return sorted((GOLDEN / paper).glob('*.safetensors'))


def single(paper: str, device: str) -> Found:
    "Every file of a paper as the tests compare it."
    rows = [one_single(path, device) for path in files_of(paper)]
    bad = [f'{row["file"]}: {row["problem"]}' for row in rows if row['problem']]
    figures = {
        'files': (len(rows), ''),
        'tensors': (sum(row['tensors'] for row in rows), ''),
        'worst of outputs': (max((row['out'] for row in rows if row['out'] is not None), default=None), 'relative'),
        'worst of gradients': (max((row['grad'] for row in rows if row['grad'] is not None), default=None), 'relative'),
    }
    return Found(figures, not bad and bool(rows), BOUND, '\n'.join(bad), rows)


BOUND = 'as in the tests: outputs 1e-5 + 1e-5 × largest number, gradients 1e-4 × largest number'


def one_single(path: Path, device: str) -> dict[str, Any]:
    "One file; what goes wrong is its problem."
    row = dict(file=path.stem, on=device, tensors=0, out=None, grad=None, problem='')
    try:
        golden, cases, place = golden_of(path, device)
        with torch.device(place):
            report = check(golden, cases)
    except Exception as error:
        return row | dict(problem=f'{type(error).__name__}: {error}'[:300])
    worst = {
        sort: max((c.error for c in report.compared if c.sort == sort), default=None) for sort in ('out', 'grad', 'ids')
    }
    problem = '; '.join(report.problems[:3]) + f' … {len(report.problems)} in all' * (len(report.problems) > 3)
    return row | dict(on=place, tensors=len(report.compared), out=worst['out'], grad=worst['grad'], problem=problem)


def half(paper: str, device: str) -> Found:
    "Every file of a paper that is not about pixels, under autocast."
    rows = [row for path in files_of(paper) if (row := one_half(path, device))]
    bad = [f'{row["file"]}: {row["problem"]}' for row in rows if row['problem']]
    figures = {'files': (len(rows), ''), 'tensors': (sum(row['tensors'] for row in rows), '')}
    for sort, name in (('out', 'outputs'), ('grad', 'gradients')):
        figures[f'worst of {name}'] = (max((row[sort] for row in rows if row[sort] is not None), default=None), 'rms')
    bound = f'root mean square of the difference ÷ that of the tensor: outputs {BF16["out"]}, gradients {BF16["grad"]}'
    return Found(figures, not bad and bool(rows), bound, '\n'.join(bad), rows)


def one_half(path: Path, device: str) -> dict[str, Any] | None:
    "One file in bf16; None: its numbers are made on the CPU."
    row = dict(file=path.stem, on=device, tensors=0, out=None, grad=None, problem='')
    try:
        golden, cases, place = golden_of(path, device)
        if any(tensor.dtype == torch.uint8 for tensor in golden.tensors.values()):
            return None
        with torch.device(place), torch.autocast(place, torch.bfloat16):
            computed = cases[golden.kind](golden.config, Given(golden.tensors))
    except Exception as error:
        return row | dict(problem=f'{type(error).__name__}: {error}'[:300])
    errors, count = errors_of(golden, computed)
    over = [f'{name} {error:.2g}' for name, error in errors.items() if not error <= BF16[name.split('.')[0]]]
    worst = {sort: max((e for n, e in errors.items() if n.startswith(sort)), default=None) for sort in BF16}
    return row | dict(tensors=count, problem='; '.join(over[:3]) + f' … {len(over)} in all' * (len(over) > 3)) | worst


def errors_of(golden: Golden, computed: dict[str, Tensor | Partial]) -> tuple[dict[str, float], int]:
    "Recorded tensor -> relative error; a tensor far below the others of its sort is measured by those."
    pairs = {}
    for name, recorded in golden.tensors.items():
        compared = name in computed and name.split('.')[0] in BF16 and recorded.is_floating_point()
        if compared and not any(word in name for word in ANSWERS):
            found = computed[name]
            where = found.where.expand(recorded.shape) if isinstance(found, Partial) else ...
            pairs[name] = (recorded[where], (found.value if isinstance(found, Partial) else found)[where])
    size = {name: rms(recorded) for name, (recorded, _) in pairs.items()}
    errors = {}
    for name, (recorded, found) in pairs.items():
        largest = max(value for other, value in size.items() if other.split('.')[0] == name.split('.')[0])
        errors[name] = rms(found - recorded) / max(size[name] + 0.02 * largest, 1e-12)
    return errors, len(pairs)


def rms(tensor: Tensor) -> float:
    "Root mean square."
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
