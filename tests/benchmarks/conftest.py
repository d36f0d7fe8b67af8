"""Timings of modules beside a matrix product measured in the same run.

A figure is judged by what the same kind of processor reached before, which `baselines/` keeps, a file for each kind.
On a kind without a file nothing is judged, and the file is written. An aim (what the official code took, a share of
the FLOPs) is held where the baseline held it: on some processors another kernel is the faster one, or none."""

import json
import re
from math import inf, isfinite, nan
from pathlib import Path

import pytest
import torch
from timing import SLACK, seconds_of

from mllm_replica.models import layers
from mllm_replica.running.journal import processor

BASELINES = Path(__file__).parent / 'baselines'
LEAST = 0.1  # a product's share below which a figure is a few milliseconds, and scatters
ATTEMPTS = 3  # a disturbed measurement is repeated
ROWS, FOUND = [], {}


def pytest_addoption(parser):
    parser.addoption(
        '--new-baseline', action='store_true', help="replace this processor's baseline by what is measured now"
    )


@pytest.fixture(autouse=True)
def one_thread():
    "Everything in this folder is measured on one thread."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def matmul():
    "Process CPU seconds of one 2048³ product in single precision, measured at each call."
    left, right = torch.randn(2, 2048, 2048)

    def product():
        return left @ right

    product()
    return lambda: seconds_of(product)


@pytest.fixture
def ratio(matmul):
    "Least process CPU time of a function over that of the product, the two measured in turn."

    def measure(function, rounds=5):
        pairs = [(matmul(), seconds_of(function)) for _ in range(rounds)]
        products, own = zip(*pairs)
        return min(own) / min(products)

    return measure


@pytest.fixture(scope='session')
def twice_as_fast():
    "Whether oneDNN is 1.5 times as fast as the BLAS: with full-width AVX-512 it is, with Zen 4's half-width it is not."
    x, weight = torch.randn(2, 2048, 2048)
    least = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for kernel in (False, True):
            patch.setattr(layers, '_ONEDNN_PAYS', kernel)
            least[kernel] = min(seconds_of(lambda: layers.affine(x, weight, None)) for _ in range(6))
    return least[False] >= 1.5 * least[True]


@pytest.fixture
def use(monkeypatch):
    "Choose the kernel of the products."

    def choose(kernel):
        if kernel == 'oneDNN' and not layers._ONEDNN_PAYS:
            pytest.skip('no faster product than the BLAS on this processor')
        monkeypatch.setattr(layers, '_ONEDNN_PAYS', kernel == 'oneDNN')

    return choose


@pytest.fixture(scope='session')
def baseline(request):
    "Figures of this kind of processor by name; none where it was never measured or is measured anew."
    file = BASELINES / f'{re.sub(r"[^a-z0-9]+", "-", processor().lower())}.json'
    known = json.loads(file.read_text()) if file.exists() else {}
    yield {} if request.config.getoption('--new-baseline') else known
    kept = known | FOUND if request.config.getoption('--new-baseline') else FOUND | known
    if kept != known:
        file.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + '\n')


@pytest.fixture
def judge(baseline):
    "Measure a figure, note it, and compare it with this processor's baseline."

    def compare(module, measure, aim=inf, kernel='', backward=False, official=nan, work=nan, least=LEAST):
        passes = 'both' if backward else 'forward'
        name = ' · '.join(part for part in (module, kernel, passes) if part)
        before = baseline.get(name, dict(measured=inf, held=False))
        limit = SLACK * max(before['measured'], least)
        if before['held']:
            limit = min(limit, aim)
        measured = measure()
        for _ in range(ATTEMPTS - 1):
            if measured > limit:
                measured = min(measured, measure())
        FOUND[name] = dict(measured=round(measured, 3), aim=None if aim == inf else round(aim, 3), held=measured <= aim)
        ROWS.append((module, kernel, passes, measured, before['measured'], aim, official, work))
        assert measured <= limit, (
            f'{name}: {measured:.3f}; the baseline of {processor()} is {before["measured"]}, the aim {aim:.3f}'
        )

    return compare


def digits(number, places):
    return f'{number:.{places}f}' if isfinite(number) else '–'


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section('CPU time ÷ that of a 2048³ matmul (fp32, one thread, batch 1, sizes of the papers)')
    write = terminalreporter.write_line
    write(f'processor {processor()}; * beyond its aim')
    write(
        f'{"module":28} {"kernel":7} {"pass":7} {"measured":>9} {"before":>8} {"aim":>8} {"official":>8} {"FLOPs":>7}'
    )
    for module, kernel, passes, measured, before, aim, official, work in ROWS:
        mark = '*' if measured > aim else ' '
        known = f'{digits(before, 3):>8} {digits(aim, 3):>8} {digits(official, 2):>8} {digits(work, 2):>7}'
        write(f'{module:28} {kernel:7} {passes:7} {measured:8.3f}{mark} {known}')
