"Waiting for data beside a device that takes 100 ms for 32 pictures of 336 pixels, and what decoding alone would make it wait."

import time

from gpu.loading import BATCH, decoding, steps_ahead, write

COMPUTE, STEPS, WORKERS = 0.1, 25, 2


def waiting(files):
    "Share of the time that a step waits for its batch, after the first ones."
    ahead, waited, begun = steps_ahead(files, WORKERS, STEPS), [], []
    for _ in range(STEPS):
        begun.append(time.perf_counter())
        _, batches = next(ahead)
        waited.append(time.perf_counter() - begun[-1])
        busy = waited[-1] + begun[-1] + COMPUTE  # a GPU at work leaves the CPU free
        batches.clear()  # as the loop does when they are on the device
        time.sleep(max(0, busy - time.perf_counter()))
    spent = time.perf_counter() - begun[5]
    return sum(waited[5:]) / spent


def test_waiting_for_pictures(tmp_path, judge):
    files = write(tmp_path, 256)
    rate = decoding(files, 256).figures['rate'][0]
    bound = max(0.0, 1 - COMPUTE / (BATCH / rate / WORKERS))  # of a loader that only decoded
    judge('waiting for 32 pictures', lambda: waiting(files), max(0.05, bound), least=0.05)
