"The script for a GPU, run without one: that it works, that nothing ends it, and what it says of a CPU."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import attention, check, page, parity, record, shapes, steps
from gpu.lacking import needed
from gpu.record import ERROR, FAIL, LEFT_OUT, MEASURED, MEMORY, PASS, Checks, Found, LeftOut

torch.set_num_threads(1)
SCRIPT = Path(check.__file__)
TINY = ['--device', 'cpu', '--tiny', '--here']


@pytest.fixture
def checks(tmp_path):
    return Checks('job', 'cpu', True, time.time() + 60, tmp_path / 'lines.jsonl', tmp_path)


def run(folder, *more):
    code = check.main(['--out', str(folder), *TINY, *more])
    return code, json.loads((folder / 'gpu-check.json').read_text()), (folder / 'gpu-check.md').read_text()


def script(name, *arguments, program=''):
    command = [sys.executable, *(['-c', program] if program else [str(SCRIPT.parent / name)]), *arguments]
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def test_it_runs_without_a_gpu_and_says_so(tmp_path):
    code, found, text = run(tmp_path, '--only', 'device', 'plan', 'parity', 'train', '--papers', 'owl3')
    assert code == 0 and found['device'] == 'cpu' and {line['status'] for line in found['results']} == {PASS, MEASURED}
    assert text.splitlines()[0].startswith('**Run on a CPU') and '# GPU check, not run on a GPU' in text
    ways = ['owl3', 'owl3, checkpointing', 'owl3, fsdp', 'owl3, fsdp, checkpointing']
    assert [step['step of'] for step in found['training']] == ways
    assert all(
        step['TFLOP/s'] > 0 and step['planned, GB'] > 0 and step['peak, GB'] is None for step in found['training']
    )
    assert sum(line['job'] == 'parity' for line in found['results']) == 10
    assert not torch.distributed.is_initialized()


def test_kernels_and_the_blank_image(checks):
    for check_of, *given in ((attention.agrees, 'honeybee', 'sdpa'), (attention.text_alone, 'eagle')):
        checks.run(given[0], check_of, *given, 'cpu')
    checks.run('flash', attention.agrees, 'honeybee', 'flash_attention_2', 'cpu')
    checks.run('50 images', attention.many_images, 'cpu', True)
    lines = list(record.read(checks.file))
    assert [line['status'] for line in lines] == [PASS, PASS, LEFT_OUT, PASS]
    assert lines[2]['detail'] == 'flash-attn needs a GPU' and lines[3]['figures']['images'] == [50, '']


def test_a_kernel_that_disagrees_fails(checks, monkeypatch):
    passes = attention.passes

    def wrong(model, batch, kernel, half, device):
        found = passes(model, batch, kernel, half, device)
        return found if kernel == 'eager' else {name: 1.1 * value for name, value in found.items()}

    monkeypatch.setattr(attention, 'passes', wrong)
    checks.run('wrong', attention.agrees, 'honeybee', 'sdpa', 'cpu')
    assert next(record.read(checks.file))['status'] == FAIL


@pytest.mark.nightly
def test_all_jobs_in_processes_of_their_own(tmp_path):
    done = script('check.py', '--out', str(tmp_path), '--device', 'cpu', '--tiny', '--papers', 'honeybee', 'eagle')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / 'gpu-check.json').read_text())
    out = {line['check'] for line in found['results'] if line['status'] == LEFT_OUT}
    assert {line['status'] for line in found['results']} == {PASS, MEASURED, LEFT_OUT}
    assert out == {f'{paper} flash_attention_2' for paper in check.PAPERS} and len(found['training']) == 8


@pytest.mark.parametrize('paper', check.PAPERS)
def test_a_blank_image_is_where_the_encoder_is(paper):
    model = shapes.build(paper, True).to('meta')
    assert (
        model.blank_pixels(2).device.type == 'meta' and shapes.build(paper, True).blank_pixels(1).device.type == 'cpu'
    )


def test_places_of_images_whatever_the_default_device():
    from mllm_replica.owl3.media import Media, Sight

    media = Media(torch.zeros(2, 4, 1), [[1, 3]])
    expected, positions = Sight.of(media, torch.arange(5)[None]), torch.arange(5)[None]
    with torch.device('meta'):
        found = Sight.of(media, positions)
    assert torch.equal(found.counts, expected.counts) and found.runs == expected.runs


@pytest.mark.nightly
def test_models_on_a_device_that_is_not_the_cpu():
    done = script('pretend.py')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(PASS) == 20


def test_only_what_a_common_image_has():
    "Without the rest of our dependencies everything is imported, and a golden file of each paper agrees."
    rest = 'fastcore datasets pyarrow pandas scipy mlflow papermill nbdev seaborn matplotlib easy_vqa nbformat'
    program = f"""
import sys
sys.path[:0] = {[str(SCRIPT.parents[1]), str(SCRIPT.parents[2])]!r}
for name in {rest.split()!r}:
    sys.modules[name] = None
from gpu.lacking import missing, stand_in
assert 'fastcore' in missing()
stand_in()
from gpu import attention, device, loading, parity, planned, shapes, steps
parity.exact()
for paper in shapes.PAPERS:
    shapes.build(paper, True)
    assert parity.one_single(parity.files_of(paper)[-1], 'cpu')['problem'] == '', paper
"""
    done = script('', program=program)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_goes_wrong_is_kept_and_the_next_check_runs(checks, capsys):
    def fails(error):
        raise error

    checks.run('error', fails, ZeroDivisionError('by nothing'))
    checks.run('memory', fails, torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'))
    checks.run('absent', fails, LeftOut('no such kernel'))
    checks.run('wrong', lambda: Found({'error': (0.5, 'relative')}, False, 'at most 0.1'))
    checks.run('long', lambda: Found(), budget=100)
    checks.run('fine', lambda: Found({'rate': (float('nan'), '')}))
    with checks.file.open('a') as file:
        file.write('{"job": "cut o')
    lines = list(record.read(checks.file))
    assert [line['status'] for line in lines] == [ERROR, MEMORY, LEFT_OUT, FAIL, LEFT_OUT, MEASURED]
    assert 'ZeroDivisionError: by nothing' in lines[0]['detail'] and 'it takes about 100 s' in lines[4]['detail']
    assert lines[5]['figures'] == {'rate': [None, '']} and len(capsys.readouterr().out.splitlines()) >= 6
    said = '\n'.join(page.troubles(lines))
    assert 'by nothing' in said and 'found error 0.5 relative; bound: at most 0.1' in said and 'no such kernel' in said


@pytest.mark.parametrize(
    'program, expected',
    [('sleep 60', 'took longer than its time'), ('echo no driver >&2; exit 3', 'ended with 3\nno driver')],
    ids=['hangs', 'dies'],
)
def test_a_job_that_hangs_or_dies_is_told(program, expected, tmp_path):
    options, job = check.arguments(['--out', str(tmp_path), *TINY]), check.JOBS[2]
    (tmp_path / 'jobs').mkdir()
    with check.file_of(options, job.name).with_suffix('.log').open('w') as log:
        process = subprocess.Popen(['sh', '-c', program], stderr=log, start_new_session=True)
    check.file_of(options, job.name).with_suffix('.now').write_text('owl2 fp32')
    check.finish(options, job, process, time.time() - 10)
    (line,) = record.read(check.file_of(options, job.name))
    assert line['check'] == 'owl2 fp32' and line['status'] == ERROR and expected in line['detail']
    assert process.poll() is not None


def test_wrong_numbers_end_with_1_and_no_gpu_with_2(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, 'half', lambda *_: Found(ok=True))
    for ok, expected in ((True, 0), (False, 1)):
        monkeypatch.setattr(parity, 'single', lambda *_: Found(ok=ok))
        assert run(tmp_path, '--only', 'parity')[0] == expected
    assert run(tmp_path, '--only', 'parity', '--minutes', '0')[0] == 1  # what was not done agrees with nothing
    if not torch.cuda.is_available():
        assert check.main(['--out', str(tmp_path), '--here', '--only', 'device', 'parity']) == 2
        said = (tmp_path / 'gpu-check.md').read_text()
        assert said.startswith('# GPU check, not run: no GPU') and '`--device cpu --tiny` tries the script' in said


def test_the_real_shapes_are_of_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.main(['--out', str(tmp_path), '--device', 'cpu'])
    assert '--device cpu needs --tiny' in capsys.readouterr().err


def test_what_is_absent_and_what_is_left_out_for_it():
    assert needed('parity', ['flash-attn', 'fastcore', 'accelerate']) == []
    assert needed('train owl2', ['fastcore', 'accelerate']) == ['accelerate']
    assert needed('loader', ['pillow']) == ['pillow']


def line(job, name, **figures):
    return dict(job=job, check=name, status=PASS, figures={k: [v, ''] for k, v in figures.items()}, bound='', detail='')


def test_a_step_beside_its_plan():
    "Twice 100 TFLOP of the model in a second, of stated 1000 and measured 800; 30 GB where 25 were planned."
    lines = [
        line('device', 'what it is', **{'published rate': 1000.0, 'device': 'a GPU'}),
        line('device', 'rates', **{'matrix product, bfloat16': 800.0}),
        line('train mm1', 'mm1', **{'step': 0.5, 'tokens': 2048.0, 'peak memory': 30.0}),
    ]
    planned = {'mm1': dict(flops=100e12, memory=dict(weights=20.0, activations=5.0))}
    (step,) = page.training(lines, planned)
    assert [step[name] for name in ('TFLOP/s', 'MFU, stated rate', 'MFU, matrix product')] == [200, 0.2, 0.25]
    assert step['peak ÷ planned'] == 1.2 and page.training(lines, {})[0]['TFLOP/s'] is None
    found = dict(device='cuda', results=lines, training=[step], missing={}, made='today', seconds=100.0)
    assert page.page(found).splitlines()[0] == '# GPU check on a GPU'
    assert '| mm1 | pass | 2,048 | 0.5 | 200 | 0.2 | 0.25 | 30 | 25 | 1.2 |' in page.page(found)


def test_the_plan_of_a_step():
    "Counted for a whole micro-batch; recomputed layers are executed, not needed."
    from gpu.planned import planned

    plain, again = (planned('honeybee', True, checkpointing, False) for checkpointing in (False, True))
    assert again.flops == plain.flops == plain.executed < again.executed
    assert again.memory['activations'] < plain.memory['activations'] and plain.trained < plain.parameters


def test_losses_of_other_ways_to_make_a_step_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, 'PLAIN', {'honeybee': [1.0] * 7})
    assert not steps.one('honeybee', True, 'cpu', tmp_path, False, False).ok
