"""Timing of modules against a matrix product measured in the same run; the table is printed at the end of the session."""
import time

import pytest
import torch

from mllm_replica import layers

ROWS = []


def pytest_itemcollected(item):
    "Other processes disturb a measurement: a bound that is missed is measured again, twice at most."
    if 'benchmark' in item.fixturenames: item.add_marker(pytest.mark.flaky(reruns=2, only_rerun='AssertionError'))


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

    def seconds():
        start = time.process_time()
        left @ right
        return time.process_time() - start

    seconds()
    return seconds


@pytest.fixture(scope='session')
def twice_as_fast():
    "Whether oneDNN is at least 1.5 times as fast as the BLAS: on AMD's full-width AVX-512 it is twice as fast, on the half-width one of Zen 4 1.2 times."
    x, weight = torch.randn(2, 2048, 2048)
    least = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for kernel in (False, True):
            patch.setattr(layers, '_ONEDNN_PAYS', kernel)
            for _ in range(6):
                start = time.process_time()
                layers.affine(x, weight, None)
                least[kernel] = min(least.get(kernel, float('inf')), time.process_time() - start)
    return least[False] >= 1.5 * least[True]


@pytest.fixture
def ratio(benchmark, matmul):
    "Least process CPU time of a function over that of the product, the two measured in turn."
    def measure(function, rounds=5):
        reference = []
        benchmark.pedantic(function, setup=lambda: reference.append(matmul()), rounds=rounds)
        return benchmark.stats.stats.min / min(reference)
    return measure


@pytest.fixture
def table():
    "Rows for the table at the end: (module, kernel of the products, pass, measured, official, bound)."
    return ROWS


def pytest_terminal_summary(terminalreporter):
    if not ROWS: return
    terminalreporter.section('CPU time ÷ that of a 2048³ matmul (fp32, one thread, batch 1, sizes of the papers)')
    write = terminalreporter.write_line
    write(f'{"module":18} {"kernel":8} {"pass":8} {"measured":>8} {"official":>8} {"FLOPs":>6} {"÷official":>9} {"÷FLOPs":>7}')
    for module, kernel, direction, measured, official, bound in ROWS:
        shares = f'{measured / official:9.2f} {measured / bound:7.2f}'
        write(f'{module:18} {kernel:8} {direction:8} {measured:8.2f} {official:8.2f} {bound:6.2f} {shares}')
