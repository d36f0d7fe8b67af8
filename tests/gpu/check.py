"""Everything that only a GPU can show, in at most eight minutes, without a network:

    python3 tests/gpu/check.py --out runs/gpu-check              on a GPU, in an image with torch, transformers, accelerate
    python3 tests/gpu/check.py --out FOLDER --device cpu --tiny  the same code on a CPU, to try the script

Each job is a process of its own: what one does to the device or to itself, the others do not feel. The folder gets
`gpu-check.json` (every figure) and `gpu-check.md` (a page). Ends with 1 where numbers are wrong: a golden file that does
not agree, or an attention kernel that disagrees; with 2 where there is no GPU."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve()
sys.path[:] = [place for place in sys.path if Path(place or '.').resolve() != HERE.parent]  # its names are its own
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from gpu.lacking import WITHOUT, missing, needed, stand_in  # noqa: E402
from gpu.page import page, training  # noqa: E402
from gpu.record import ERROR, FAIL, LEFT_OUT, PASS, Checks, read  # noqa: E402

PAPERS = ('honeybee', 'owl2', 'mm1', 'eagle', 'owl3')


class Job(NamedTuple):
    """A process.

    function: of a module beside this one
    seconds: at most
    given: arguments
    """

    name: str
    function: str
    seconds: float
    given: tuple = ()


JOBS = (
    Job('plan', 'planned.run', 200),
    Job('device', 'device.run', 120),
    Job('parity', 'parity.run', 80),
    *(Job(f'train {paper}', 'steps.run', 70, ((paper,),)) for paper in PAPERS),
    Job('compile', 'steps.run_compiled', 80),
    Job('attention', 'attention.run', 150),
    Job('loader', 'loading.run', 60),
)


def arguments(given: list[str] | None) -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser('check.py', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for gpu-check.json and gpu-check.md')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--tiny', action='store_true', help='shapes of a few numbers')
    parser.add_argument(
        '--minutes', type=float, default=7.75, help='no job begins after that, and those that run are ended'
    )
    parser.add_argument('--only', nargs='+', choices=sorted({job.name.split()[0] for job in JOBS}), help='these jobs')
    parser.add_argument('--papers', nargs='+', choices=PAPERS, default=PAPERS, help='whose steps are measured')
    parser.add_argument(
        '--here', action='store_true', help='all in this process: what hangs or crashes ends everything'
    )
    parser.add_argument('--job', help=argparse.SUPPRESS)
    parser.add_argument('--until', type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.device == 'cpu' and not options.tiny:
        parser.error('--device cpu needs --tiny: the real shapes are of a GPU')
    return options


def file_of(options: argparse.Namespace, job: str) -> Path:
    "Where a job keeps its lines."
    return options.out / 'jobs' / f'{job.replace(" ", "-")}.jsonl'


def work(options: argparse.Namespace, job: Job, until: float) -> None:
    "Make a job's checks in this process."
    stand_in()
    module, function = job.function.split('.')
    checks = Checks(job.name, options.device, options.tiny, until, file_of(options, job.name), options.out / 'jobs')
    given = (tuple(options.papers),) if job.name == 'plan' else job.given
    getattr(import_module(f'gpu.{module}'), function)(checks, *given)


def told(options: argparse.Namespace, job: Job, check: str, status: str, detail: str) -> None:
    "A line in place of a job's own."
    line = dict(job=job.name, check=check, status=status, seconds=0, figures={}, bound='', detail=detail, rows=[])
    with file_of(options, job.name).open('a') as lines:
        lines.write(json.dumps(line) + '\n')
    print(f'{status:13} {job.name}: {check}: {detail}', flush=True)


def start(options: argparse.Namespace, job: Job, until: float) -> subprocess.Popen:
    "A job in a process of its own, its errors in a file."
    command = [sys.executable, str(HERE), '--job', job.name, '--until', str(until), '--out', str(options.out)]
    command += ['--device', options.device, '--papers', *options.papers] + ['--tiny'] * options.tiny
    with file_of(options, job.name).with_suffix('.log').open('w') as log:
        return subprocess.Popen(command, stderr=log, start_new_session=True)


def finish(options: argparse.Namespace, job: Job, process: subprocess.Popen, until: float) -> None:
    "Wait for a job; one that takes too long, or dies, leaves a line that says so."
    file, problem = file_of(options, job.name), ''
    try:
        if code := process.wait(max(1.0, until + 10 - time.time())):
            log = file.with_suffix('.log').read_text().strip().splitlines()
            problem = '\n'.join([f'the process ended with {code}', *log[-6:]])
    except subprocess.TimeoutExpired:
        problem = 'stopped: it took longer than its time'
    with contextlib.suppress(ProcessLookupError):  # its workers, too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if problem:
        now = file.with_suffix('.now')
        told(options, job, now.read_text() if now.exists() else 'start', ERROR, problem)


def lacks_device(lines: Iterable[dict]) -> bool:
    "Whether the first check found no GPU."
    return any((line['job'], line['check'], line['status']) == ('device', 'what it is', ERROR) for line in lines)


def all_jobs(options: argparse.Namespace, jobs: list[Job], deadline: float, absent: list[str]) -> None:
    "One after the other; the plan is counted beside them, by the CPU."
    background = None
    for job in jobs:
        until = min(deadline, time.time() + job.seconds)
        reason = 'no time was left' if until - time.time() < 5 else ''
        if reason := reason or ', '.join(f'{name} is not installed' for name in needed(job.name, absent)):
            told(options, job, 'all', LEFT_OUT, reason)
        elif options.here:
            work(options, job, until)
        elif job.name == 'plan':
            background = job, start(options, job, until), until
        else:
            finish(options, job, start(options, job, until), until)
        if lacks_device(read(file_of(options, job.name))):
            deadline = 0.0
            break
    if background:
        finish(options, *background[:2], min(background[2], deadline))


def report(options: argparse.Namespace, jobs: list[Job], began: float, absent: list[str]) -> int:
    "Write what was found; the exit code."
    lines = [line for job in jobs for line in read(file_of(options, job.name))]
    file = options.out / 'jobs' / 'planned.json'
    planned = json.loads(file.read_text()) if file.exists() else {}
    found = dict(
        made=datetime.now(UTC).isoformat(timespec='seconds'),
        device=options.device,
        tiny=options.tiny,
        seconds=time.time() - began,
        missing={name: WITHOUT.get(name, 'nothing can be checked') for name in absent},
        training=training(lines, planned),
        planned=planned,
        results=lines,
    )
    (options.out / 'gpu-check.json').write_text(json.dumps(found, indent=1) + '\n')
    (options.out / 'gpu-check.md').write_text(page(found))
    print(f'{options.out / "gpu-check.md"} and .json, {found["seconds"]:.0f} s')
    parity, kernels = ([line['status'] for line in lines if line['job'] == job] for job in ('parity', 'attention'))
    asked = any(job.name == 'parity' for job in jobs)
    wrong = FAIL in kernels or asked and (not parity or any(status != PASS for status in parity))
    return 2 if lacks_device(lines) else int(wrong)


def main(given: list[str] | None = None) -> int:
    "Run the jobs, write the page."
    options, began = arguments(given), time.time()
    if options.job:
        work(options, next(job for job in JOBS if job.name == options.job), options.until)
        return 0
    (options.out / 'jobs').mkdir(parents=True, exist_ok=True)
    for old in (options.out / 'jobs').glob('*.*'):
        old.unlink()
    chosen = [job for job in JOBS if not options.only or job.name.split()[0] in options.only]
    chosen = [job for job in chosen if not job.given or job.given[0][0] in options.papers]
    absent = missing()
    all_jobs(options, chosen, began + 60 * options.minutes, absent)
    return report(options, chosen, began, absent)


if __name__ == '__main__':
    sys.exit(main())
