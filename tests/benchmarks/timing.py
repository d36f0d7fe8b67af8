"How a function is timed."

import statistics
import time

SLACK = 1.2  # other processes share the machine


def seconds_of(function):
    "Process CPU seconds of one call."
    start = time.process_time()
    function()
    return time.process_time() - start


def beside(function, other, rounds=9):
    "Median ratio of the CPU times of two functions, run in turn, each first in turn; a pair scatters by 5 %."

    def pair(turn):
        order = (function, other) if turn % 2 else (other, function)
        spent = {this: seconds_of(this) for this in order}
        return spent[function] / spent[other]

    pair(0)  # warms up
    return statistics.median(pair(turn) for turn in range(rounds))
