"What a user waits for: imports, a finished table, pictures of a world, answers. CPU time beside the matrix product."

import json
import subprocess
import sys

import pytest
from fullsize.answers import Thousand
from timing import seconds_of

from mllm_replica.data.worlds.making import build_world, read_world
from mllm_replica.running.runner import run_tables

TASKS = ['cell', 'relation', 'existence', 'count', 'tint']
FINISHED = """
from mllm_replica.core import registry
registry.CHAPTERS['mm1'] = 'toychapter'
from mllm_replica.running.runner import run_tables
assert run_tables('mm1', ['second'], seeds=[10], pipeline={pipeline!r}).skipped == 2
"""


def program_seconds(text, **how):
    "Process CPU seconds that a program says it took after the interpreter had started."
    timed = f'import time; start = time.process_time()\n{text}\nprint("\\n", time.process_time() - start)'
    done = subprocess.run([sys.executable, '-c', timed], capture_output=True, text=True, check=True, **how)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('module', ['mllm_replica', 'mllm_replica.cli'])
def test_import(module, matmul, judge):
    judge(f'import {module}', lambda: min(program_seconds(f'import {module}') for _ in range(3)) / matmul())


def test_a_finished_table(project, inline, matmul, judge):  # noqa: F811
    assert run_tables('mm1', ['second'], seeds=[10], pipeline=project.pipeline).exit_code == 0
    text = FINISHED.format(pipeline=str(project.pipeline))
    judge('a finished table', lambda: min(program_seconds(text, cwd=project.root) for _ in range(2)) / matmul())


def test_four_thousand_tiles(matmul, judge, monkeypatch, tmp_path):
    seeds = iter(range(100))

    def write():
        path = build_world('tiles', 'train', next(seeds), 4000, tasks=TASKS, turns=5, style='textured')
        assert len(read_world(path)) == 4000

    judge('4000 tiles', lambda: seconds_of(write) / matmul())


def test_a_thousand_answers(matmul, judge, tmp_path):
    asked, names = Thousand(), iter(range(100))
    judge('1000 answers', lambda: seconds_of(lambda: asked(tmp_path / str(next(names)))) / matmul())
