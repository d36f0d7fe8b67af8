"Everything that can happen to a unit: the journal tells the truth, the others finish, the next run does only the rest."

import os, signal

import psutil
import pytest

from mllm_replica.running.runner import run_tables
from toyproject import PARAMETERS, RESULT, until, write_notebook

ROWS = ['good', 'raises', 'exits', 'killed', 'hangs', 'late']


def kernels(project):
    "Processes that still work for the project's units."
    found = []
    for process in psutil.process_iter(['environ']):
        try:
            mine = (process.info['environ'] or {}).get('MLLM_REPLICA_RUNS') == str(project.runs)
        except psutil.Error:
            continue
        if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def iter_until(stream, word):
    "Lines of a process up to the first with the word."
    for line in stream:
        yield line
        if word in line:
            return


def test_faults_are_told_apart_and_only_the_rest_runs_again(project):
    project.faults.touch()

    def run(**kw):
        return run_tables('mm1', ['faults'], 'smoke', workers=2, pipeline=project.pipeline, report=False, **kw)

    first, hung = run(rows=[row for row in ROWS if row != 'hangs']), run(rows=['hangs'], timeout=5.0)
    found = {o.label.split('/')[2]: o for o in first.outcomes + hung.outcomes}
    statuses = dict(good='finished', raises='failed', exits='failed', killed='failed', hangs='timeout', late='failed')
    assert {row: o.status for row, o in found.items()} == statuses
    assert (first.exit_code, hung.exit_code) == (1, 1) and not first.problems + hung.problems
    assert found['raises'].reason.endswith('raised ZeroDivisionError: division by zero') and found['raises'].cell == 3
    assert 'sys.exit' in found['exits'].reason and found['exits'].exit_code == 0
    assert (found['killed'].signal, found['killed'].cell) == ('SIGKILL', 3)
    assert found['hangs'].reason == 'it ran longer than 5 s'
    assert all(o.peak_memory_mb > 20 for o in found.values())
    assert 'ZeroDivisionError' in str(first) and any('ZeroDivisionError' in line for line in found['raises'].log_tail)
    late = project.runs / 'units' / found['late'].unit_key
    assert (late / 'result.rejected.json').exists() and not (
        late / 'result.json'
    ).exists()  # it had written a result, then failed
    assert dict((row, event) for event, row in project.events()) == statuses
    tracked = project.tracked()
    assert {row: tracked[row][0] for row in ROWS} == {row: 'FINISHED' if row == 'good' else 'FAILED' for row in ROWS}
    assert 'division by zero' in tracked['raises'][2]['failure']
    assert not kernels(project)

    project.faults.unlink()
    before = len(project.events('started'))
    second = run()
    assert (second.exit_code, second.skipped) == (0, 1)
    assert sorted(row for _, row in project.events('started')[before:]) == sorted(set(ROWS) - {'good'})
    tracked = project.tracked()
    assert {tracked[row][0] for row in ROWS} == {'FINISHED'}
    good = tracked['good'][1]
    assert (good['replicated/toy'], good['published/acc'], good['loss']) == (
        0.6,
        50.0,
        1.5,
    ) and 'difference/acc' not in good

    third = run()
    assert (third.exit_code, third.skipped, third.outcomes) == (0, 6, [])


def test_bad_parameters_stop_everything_before_a_process_starts(project):
    def run(pipeline):
        return run_tables('mm1', ['faults'], 'smoke', rows=['good'], pipeline=pipeline)

    def notebook(source, tags=('parameters',)):
        return write_notebook(project.root / 'bad.ipynb', source, RESULT, tags=tags)

    with pytest.raises(ValueError, match='0 cells tagged `parameters`'):
        run(notebook(PARAMETERS, ()))
    with pytest.raises(ValueError, match='the notebook wants steps'):
        run(notebook(PARAMETERS + '\nsteps: int = 3'))
    with pytest.raises(ValueError, match='seed is int, the notebook wants str'):
        run(notebook(PARAMETERS.replace('int', 'str')))
    with pytest.raises(KeyError, match="no rows .'goood'.*good, raises"):
        run_tables('mm1', ['faults'], 'smoke', rows=['goood'])
    with pytest.raises(ValueError, match='seed'):
        run_tables('mm1', ['faults'], 'smoke', rows=['good'], seeds=['10'])
    assert not project.runs.exists()


def test_ctrl_c_kills_units_and_ends_their_runs(project):
    project.faults.touch()
    process = project.start('hangs')
    until(lambda: project.events('started') and len(kernels(project)) >= 2 and 'hangs' in project.tracked())
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode != 0 and 'KeyboardInterrupt' in output
    assert project.events()[-1] == ('killed', 'hangs')
    assert not kernels(project)
    assert {run[0] for run in project.tracked().values()} == {'KILLED'}


def test_a_killed_runner_leaves_no_process_and_no_lie(project):
    project.faults.touch()
    process = project.start('hangs')
    until(lambda: project.events('started') and len(kernels(project)) >= 2)
    until(lambda: 'hangs' in project.tracked())
    process.kill()
    process.communicate()
    until(lambda: not kernels(project))
    assert {run[0] for run in project.tracked().values()} == {'RUNNING'}  # what the tracker believes
    project.faults.unlink()
    again = project.start('good')
    output, _ = again.communicate()
    assert again.returncode == 0 and 'lost      mm1/faults/hangs/smoke/10' in output and 'orphan' in output, output
    tracked = project.tracked()
    assert (tracked['hangs'][0], tracked['good'][0]) == ('KILLED', 'FINISHED')
    assert ('lost', 'hangs') in project.events()


def test_two_runs_on_one_output_share_the_work(project):
    gate, closed = project.close_gate()
    both = [project.start('good', 'raises', PYTHONUNBUFFERED='1', **closed) for _ in range(2)]
    said = [
        ''.join(iter_until(process.stdout, 'started ')) for process in both
    ]  # each has a unit of its own at work, or waits for the other's
    gate.unlink()
    output = [before + process.communicate()[0] for before, process in zip(said, both)]
    assert [process.returncode for process in both] == [0, 0], (
        output
    )  # also: two processes created the tracker's tables at once
    assert sorted(project.events('started')) == [('started', 'good'), ('started', 'raises')]
    assert {row: run[0] for row, run in project.tracked().items()} == dict(
        good='FINISHED', raises='FINISHED', table='FINISHED'
    )
    assert '2 units finished' in output[0] and '2 units finished' in output[1]
