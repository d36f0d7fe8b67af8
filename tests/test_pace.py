"What a training says while it runs. Run as a program (`test_pace.py FOLDER PAPER…`) this file is one of two processes that train together."

import io, json, os, subprocess, sys, types, warnings
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Recipe, Stage
from mllm_replica.core.registry import recipes_of
from mllm_replica.core.settings import settings
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.packing import collate
from mllm_replica.planning import flops
from mllm_replica.running import books as books_of
from mllm_replica.running import launch, runner, unit
from mllm_replica.running.engine import Metric, Result
from mllm_replica.running.following import Following
from mllm_replica.running.progress import Display, ProgressFile, duration
from mllm_replica.running.show import curve_figure
from mllm_replica.running.tracking import Tracker
from mllm_replica.running.worker import Order, Outcome
from mllm_replica.training import pace
from mllm_replica.training.checkpoint import load_latest, read_curve
from mllm_replica.training.held_out import HeldOut, some_encoded
from mllm_replica.training.loop import train
from mllm_replica.training.pace import FLOPS, HELD_OUT, PACE, pace_said, parse_pace, read_pace
from toys import model_of

TALKS = Machine(log_every=2, eval_every=3)
SYSTEM = 'system/cpu_utilization_percentage'


def samples(model, name, pictured):
    "One sample for each entry, with an image where it is true; some tokens are dropped at random while it trains."
    image = getattr(model.config, 'placeholder_ids', None)
    image = image or [model.config.image_token_id] * model.config.visual_token_count()
    made, draw = [], torch.Generator().manual_seed(len(name))
    for number, with_image in enumerate(pictured):
        ids = [1, *(image if with_image else []), *range(10, 14 + number % 4)]
        more = dict(image_spans=[(1, 1 + len(image))], images=[torch.randn(3, 16, 16, generator=draw)])
        labels = [-100] * (len(ids) - 3) + ids[-3:]
        made.append(Encoded(f'{name}-{number}', ids, labels, **(more if with_image else {})))
    return made


def stages_of(steps=(3, 5), connector='connector', **more):
    shared = dict(mixture={'talk': 1.0}, batch_size=4, lr=1e-3, checkpoint_every=2) | more
    trained = dict(align=(f'^{connector}',), tune=(f'^{connector}', 'language_model'))
    return [Stage(name=n, trainable=t, steps=s, **shared) for (n, t), s in zip(trained.items(), steps)]


def run(folder, machine=Machine(), held=True, paper='honeybee', steps=(3, 5), dropout=0.3, **options):
    model = model_of(paper)
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = dropout
    data = {'talk': samples(model, 'talk', [True, False, True, True] * 4)}
    how = dict(pad_token_id=0)
    found = HeldOut(
        {'seen': samples(model, 'seen', [True] * 5), 'mixed': samples(model, 'mixed', [True, False, False])},
        lambda batch: collate(batch, **how),
        batch_size=1,
    )
    history = train(
        model,
        stages_of(steps, model.connector_name),
        data,
        lambda batch: collate(batch, **how),
        Path(folder),
        7,
        machine=machine,
        held_out=found if held else None,
        **options,
    )
    return model, history


def of(lines, name):
    return {line['step']: line[name] for line in lines if name in line}


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- while it trains --------------------------------------------------------------------------------------------------------------------
def test_who_looks_on_changes_no_bit(tmp_path):
    plain, _ = run(tmp_path / 'plain', held=False)
    watched, _ = run(tmp_path / 'watched', TALKS)
    for (name, one), other in zip(plain.state_dict().items(), watched.state_dict().values()):
        assert torch.equal(one, other), name
    curves = [(tmp_path / folder / 'curve.csv').read_bytes() for folder in ('plain', 'watched')]
    assert curves[0] == curves[1]
    lines = read_pace(tmp_path / 'watched')
    assert list(of(lines, 'tokens_per_second')) == [2, 3, 4, 6, 8]  # every second step, and the ends of stages
    assert list(of(lines, HELD_OUT + 'seen')) == list(of(lines, HELD_OUT + 'mixed')) == [3, 6, 8]
    assert list(of(read_pace(tmp_path / 'plain'), 'tokens_per_second')) == [3, 8]
    for line in lines:
        assert HELD_OUT + 'seen' in line or {SYSTEM, 'device_peak_memory_mb', 'waiting_for_data'} <= line.keys()
    assert 'mfu' not in set().union(*lines)  # a CPU has no peak
    last = lines[-2]
    assert 0 <= last['waiting_for_data'] <= 1 and 50 < last['device_peak_memory_mb'] < 50_000


def test_the_held_out_loss_is_the_mean_over_supervised_tokens(tmp_path):
    model, _ = run(tmp_path, TALKS)
    found = read_pace(tmp_path)[-1]
    for name, pictured in {'seen': [True] * 5, 'mixed': [True, False, False]}.items():
        rows = samples(model, name, pictured)
        with torch.no_grad():
            losses = [model(**{k: v for k, v in collate([row], 0).items() if k != 'ids'}).loss for row in rows]
        assert found[HELD_OUT + name] == pytest.approx(float(sum(losses)) / len(losses), rel=1e-5)  # 3 tokens each


def test_tokens_are_the_positions_without_padding(tmp_path, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(pace.time, 'perf_counter', tick)
    model, _ = run(tmp_path, TALKS, steps=(4, 0))
    seen = json.loads((tmp_path / 'order-0.json').read_text())
    assert seen['steps'] == 4
    from mllm_replica.data.mixture import Mixture

    order, data = Mixture.load(tmp_path / 'order-0.json'), samples(model, 'talk', [True, False, True, True] * 4)
    steps = [sum(len(data[index]) for _, index in order.indices(step, 4)) for step in range(4)]
    lines = [line for line in read_pace(tmp_path) if 'tokens_per_second' in line]
    for line, two in zip(lines, (steps[:2], steps[2:])):
        assert line['tokens_per_second'] * line['seconds_per_step'] * 2 == pytest.approx(sum(two), rel=1e-4)
        assert line['seconds_per_step'] == 2 and line['waiting_for_data'] == 0.5


def test_packed_rows_and_models_without_masks_are_counted_whole():
    rows = [Encoded(str(n), [1] * n, [1] * n) for n in (3, 4, 5)]
    assert pace.positions_of(collate(rows, 0)) == 12
    assert pace.positions_of(collate(rows, 0, packed=True, length=8)) == 16
    assert pace.positions_of({'labels': torch.zeros(2, 7)}) == 14


def test_a_resumed_run_says_each_step_once(tmp_path):
    def stop(done, total, loss):
        if done == 7:
            raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        run(tmp_path, Machine(log_every=1, eval_every=1), progress=stop)
    with (tmp_path / PACE).open('a') as file:
        file.write('{"step": 4, "tok')
    assert of(read_pace(tmp_path), 'tokens_per_second').keys() == set(range(1, 8))
    done = load_latest(tmp_path / 'checkpoints').step
    assert done < 7
    run(tmp_path, Machine(log_every=1, eval_every=1))
    steps = [line['step'] for line in read_pace(tmp_path) if 'tokens_per_second' in line]
    assert steps == list(range(1, 9)) and (tmp_path / PACE).read_text().count('\n') == 16


def test_a_loss_that_is_no_number_is_said_and_not_written(tmp_path):
    model = model_of('honeybee')
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float('nan'))
    alone = types.SimpleNamespace(device=torch.device('cpu'), num_processes=1, process_index=0)
    found = HeldOut({'seen': samples(model, 'seen', [True])}, lambda batch: collate(batch, 0))
    with pytest.warns(UserWarning, match="the held-out loss of 'seen' is nan"):
        assert found.losses(model, alone, stages_of()[0]) == {}


def test_samples_that_cannot_be_encoded_are_left_out():
    def encode(sample):
        if sample['id'] == '2':
            raise ValueError('sample 2 has no image')
        answer = [] if sample['id'] == '4' else [5, 6]
        return Encoded(sample['id'], [1, 2, *answer], [-100, -100, *answer])

    rows = [dict(id=str(n)) for n in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert [s.id for s in some_encoded('test', rows, encode, 6, 9)] == ['0', '1', '3', '5']
    with pytest.warns(UserWarning, match="'test' gives no held-out loss: sample 2 has no image"):
        assert some_encoded('test', rows[2:3], encode, 6, 9) == []
    with pytest.warns(UserWarning, match="sample '4' has no answer"):
        some_encoded('test', rows[4:5], encode, 6, 9)


@pytest.mark.slow
def test_two_processes_in_shares_say_what_one_says(tmp_path):
    "Also where a share has no image or no sample left; checkpoints after a held-out loss hold shares."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    done = subprocess.run(
        [*command, __file__, str(tmp_path / 'two')], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for paper in ('honeybee', 'owl3'):
        _, history = run(tmp_path / 'one' / paper, TALKS, paper=paper, dropout=0.0)
        alone, together = (read_pace(tmp_path / kind / paper) for kind in ('one', 'two'))
        for name in (HELD_OUT + 'seen', HELD_OUT + 'mixed'):
            assert of(together, name) == pytest.approx(of(alone, name), rel=1e-4), name
        assert [line['step'] for line in together] == [line['step'] for line in alone]
        counted = [line['tokens_per_second'] * line['seconds_per_step'] for line in together if SYSTEM in line]
        plain = [line['tokens_per_second'] * line['seconds_per_step'] for line in alone if SYSTEM in line]
        assert counted == pytest.approx(plain, rel=1e-3)
        assert load_latest(tmp_path / 'two' / paper / 'checkpoints').step == 8


# --- the machine ------------------------------------------------------------------------------------------------------------------------
class FakeNvml:
    NVMLError = OSError

    def __getattr__(self, name):
        answers = dict(nvmlDeviceGetCount=2, nvmlDeviceGetUtilizationRates=types.SimpleNamespace(gpu=97))
        answers['nvmlDeviceGetMemoryInfo'] = types.SimpleNamespace(used=60e9, total=80e9)

        def answer(*given):
            if given == (1,) and name == 'nvmlDeviceGetUtilizationRates':
                raise OSError('not supported')
            return given[0] if name == 'nvmlDeviceGetHandleByIndex' else answers.get(name)

        return answer


@pytest.fixture
def fresh_gpus():
    pace._gpus.cache_clear()
    yield
    pace._gpus.cache_clear()


def test_gpus_are_named_as_the_trackers_page_wants(fresh_gpus, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', FakeNvml())
    found = pace.system_metrics()
    assert found['system/gpu_0_utilization_percentage'] == 97 and 'system/gpu_1_utilization_percentage' not in found
    assert (
        found['system/gpu_1_memory_usage_megabytes'] == 60_000 and found['system/gpu_1_memory_usage_percentage'] == 75
    )


def test_without_a_driver_there_is_nothing_to_say_of_gpus(fresh_gpus, monkeypatch):
    broken = types.ModuleType('pynvml')
    broken.nvmlInit = lambda: (_ for _ in ()).throw(OSError('no driver'))
    monkeypatch.setitem(sys.modules, 'pynvml', broken)
    assert not any('gpu' in name for name in pace.system_metrics())


def test_names_are_those_of_mlflows_own_monitor():
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    assert {f'system/{name}' for name in monitor.metrics} <= pace.system_metrics().keys()


@pytest.fixture
def counted_at_once(monkeypatch):
    "The process that counts is waited for, so that even a short training reads its answer."
    start = subprocess.Popen

    def at_once(command, **how):
        process = start(command, **how)
        process.wait()
        return process

    monkeypatch.setattr(launch.subprocess, 'Popen', at_once)


def test_a_unit_with_a_given_peak_tells_its_mfu(tmp_path, monkeypatch, counted_at_once):
    recipe = recipes_of('honeybee').recipe('3', 'cabs_144', 'smoke', 10)
    machine = Machine(log_every=1, eval_every=2, eval_samples=3, peak_tflops=0.05)
    monkeypatch.setattr(unit, 'settings', lambda: settings().model_copy(update={'machine': machine}))
    result = unit.run_unit(recipe, tmp_path)
    lines, said = read_pace(tmp_path), json.loads((tmp_path / FLOPS).read_text())
    assert said['peak'] == 5e10 and list(said['stages']) == [stage.name for stage in recipe.stages]
    for line in (line for line in lines if SYSTEM in line):
        rates = [flops * line['tokens_per_second'] / 5e10 for flops in said['stages'].values()]
        assert any(line['mfu'] == pytest.approx(rate, rel=1e-3) for rate in rates)
    held = {name for line in lines for name in line if name.startswith(HELD_OUT)}
    assert held == {HELD_OUT + benchmark.source for benchmark in recipe.benchmarks}
    assert result.machine['eval_every'] == 2 and 'MFU' in pace_said(lines)


def test_counting_that_fails_is_said_and_stops_nothing(tmp_path, capsys, counted_at_once):
    (tmp_path / FLOPS).write_text('{"peak": 1, "stages": {}}')
    with launch.counting(tmp_path, Machine(peak_tflops=1), [], {}, False):
        assert not (tmp_path / FLOPS).exists()  # of an earlier attempt, perhaps on another device
    assert 'so there is no MFU' in (said := capsys.readouterr().out) and 'recipe.json' in said


def test_on_a_cpu_nothing_is_counted_unless_a_peak_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.subprocess, 'Popen', None)
    with launch.counting(tmp_path, Machine(), [], {}, False):
        pass
    monkeypatch.setenv('RANK', '1')
    with launch.counting(tmp_path, Machine(peak_tflops=1), [], {}, False):
        pass


def test_bf16_has_a_peak_where_the_table_has_the_device(monkeypatch):
    recipe = Recipe(
        paper='honeybee', table='1', row='r', scale='smoke', seed=0, model={}, benchmarks=(),
        sources={'talk': dict(kind='world', name='tiles')},
        stages=(stages_of()[0], stages_of(precision='bf16')[1]),
    )  # fmt: skip
    monkeypatch.setattr(flops, 'flops_per_position', lambda build, stage, *sample: float(sum(sample)))
    monkeypatch.setattr(flops, 'recipes_of', lambda paper: types.SimpleNamespace(build=None))
    asked = dict(device='NVIDIA A100-SXM4-80GB', peak=None, cached=True, stages={'align': [10, 1], 'tune': [20, 2]})
    assert flops.answer(recipe, asked) == dict(peak=312e12, stages={'tune': 23.0})
    assert flops.answer(recipe, asked | dict(device='NVIDIA L4')) == dict(peak=None, stages={})
    assert flops.answer(recipe, asked | dict(peak=1e12))['stages'] == {'align': 12.0, 'tune': 23.0}


# --- the tracker ------------------------------------------------------------------------------------------------------------------------
RECIPE = Recipe(
    paper='mm1',
    table='3',
    row='wide',
    scale='smoke',
    seed=10,
    model={'width': 8},
    sources={'talk': dict(kind='world', name='tiles')},
    stages=tuple(stages_of((100, 140))),
    benchmarks=(),
)
HEAD = 'step,stage,loss,lr,grad_norm,tokens\n'


def curve_until(step):
    return HEAD + ''.join(f'{n},align,{1 / n},0.1,1.0,12\n' for n in range(1, step + 1))


def pace_until(step):
    return ''.join(json.dumps({'step': n, 'tokens_per_second': 5.0 + n}) + '\n' for n in range(10, step + 1, 10))


@pytest.fixture(scope='module')
def tracker(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tracked')
    with Tracker(f'sqlite:///{folder}/mlflow.db', folder) as tracker:
        yield tracker


@pytest.fixture
def books(tmp_path, tracker, monkeypatch):
    "What opens the books of one unit that runs, its order, and the tracker."
    monkeypatch.setattr(books_of, 'code_of_table', lambda *table: tmp_path.name)
    monkeypatch.setattr(runner.Books, '_numbers', lambda books, recipe, result: {'replicated/toy': 0.5})
    monkeypatch.setattr(runner.Books, 'EVERY', 0.0)
    order = Order(recipe=RECIPE, unit_key='key', notebook=Path('n'), run_folder=tmp_path, timeout=None)
    order.folder.mkdir(parents=True)
    plan = runner.Plan('mm1', 'smoke', ['3'], {'key': [RECIPE]})

    def opened():
        tracker.last.clear()  # as in a new process
        made = runner.Books(tracker, plan, ['3'], tmp_path, [])
        made.start(order)
        return made

    return opened, order, tracker


def history_of(tracker, run, name):
    return [m.step for m in tracker.client.get_metric_history(run, name)]


def write(order, curve, paced):
    (order.folder / 'curve.csv').write_text(curve_until(curve))
    (order.folder / PACE).write_text(pace_until(paced))


def leave_result(order):
    numbers = dict(steps=240, train_seconds=1.0, seconds=1.0, peak_memory_mb=1.0)
    result = Result(
        label=RECIPE.label, digest=RECIPE.digest(), metrics={'toy': Metric(value=0.5)}, versions={}, **numbers
    )
    (order.folder / 'result.json').write_text(result.model_dump_json())


STRIDE = list(range(2, 241, 2))  # 240 steps of 4 numbers, at most 900


def test_points_come_while_it_runs_and_none_twice(books):
    opened, order, tracker = books
    first = opened()
    (run,) = first.runs.values()
    first.look()
    write(order, 63, 60)
    first.look()
    assert history_of(tracker, run, 'loss') == STRIDE[:31]
    assert history_of(tracker, run, 'tokens_per_second') == list(range(10, 61, 10))
    write(order, 71, 70)
    first.look()
    first.look()
    assert history_of(tracker, run, 'loss') == STRIDE[:35]
    write(order, 60, 60)  # killed; the next attempt cuts to its checkpoint
    first.end(order, Outcome(label='l', unit_key='key', status='killed'))

    again = opened()
    assert list(again.runs.values()) == [run]
    write(order, 66, 60)
    again.look()
    write(order, 200, 200)
    again.look()
    write(order, 240, 240)
    leave_result(order)
    again.end(order, Outcome(label='l', unit_key='key', status='finished'))
    assert history_of(tracker, run, 'loss') == history_of(tracker, run, 'tokens') == STRIDE
    assert history_of(tracker, run, 'tokens_per_second') == list(range(10, 241, 10))
    assert tracker.client.get_run(run).info.status == 'FINISHED' and not first.problems + again.problems
    assert 'pace.jsonl' in {file.path for file in tracker.client.list_artifacts(run)}


@pytest.mark.parametrize('failing', [0, 1])
def test_a_tracker_that_fails_on_the_way_is_said_and_the_rest_is_logged_at_the_end(books, monkeypatch, failing):
    opened, order, tracker = books
    one = opened()
    (run,) = one.runs.values()
    write(order, 20, 20)
    one.look()
    log, calls = tracker.client.log_batch, []

    def broken(*given, **more):
        calls.append(more)
        if len(calls) > failing:
            raise OSError('the disk is full')
        return log(*given, **more)

    monkeypatch.setattr(tracker.client, 'log_batch', broken)
    one.followed['key'][1].every = 1  # every step counts, so that there are several calls
    write(order, 240, 240)
    many = 'step,' + 'stage,' + ','.join(f'm{n}' for n in range(9)) + '\n'
    (order.folder / 'curve.csv').write_text(many + ''.join(f'{s},a' + ',1.0' * 9 + '\n' for s in range(1, 241)))
    one.look()
    monkeypatch.setattr(tracker.client, 'log_batch', log)
    assert len(one.problems) == 1 and 'the disk is full' in one.problems[0] and 'while it runs' in one.problems[0]
    one.look()
    leave_result(order)
    one.end(order, Outcome(label='l', unit_key='key', status='finished'))
    assert len(one.problems) == 1 and tracker.client.get_run(run).info.status == 'FINISHED'
    for name in ('m0', 'm8', 'tokens_per_second'):
        steps = history_of(tracker, run, name)
        assert steps == sorted(set(steps)) and steps[-1] == 240, name


def test_a_long_curve_keeps_every_tenth_step(tmp_path):
    (tmp_path / 'curve.csv').write_text(curve_until(20_000))
    points = Following(tmp_path, 20_000, 10).points()
    assert [step for name, step, _ in points if name == 'lr'] == list(range(10, 20_001, 10))
    assert len(Following(tmp_path, 20_000, 1000).points()) <= 900


def test_a_unit_that_runs_is_tracked_before_it_ends(project, monkeypatch, inline):
    "The whole way: the toy unit, whose notebook asks the tracker in its middle."
    seen = {}
    look = runner.Books.look

    def looking(books):
        books.next = 0.0
        look(books)
        seen.update({key: dict(books.tracker.client.get_run(run).data.metrics) for key, run in books.runs.items()})

    monkeypatch.setattr(runner.Books, 'look', looking)
    gate, environment = project.close_gate()
    monkeypatch.setenv('TOY_GATE', str(gate))
    cells = json.loads(project.pipeline.read_text())
    early = "(Path(out_dir)/'curve.csv').write_text('step,stage,loss\\n1,joint,2.5\\n')\n"
    for cell in cells['cells']:
        if 'TOY_GATE' in cell['source']:
            cell['source'] = cell['source'].replace('while Path', early + 'while Path')
    project.pipeline.write_text(json.dumps(cells))
    import threading

    def open_gate():
        while not any('loss' in numbers for numbers in list(seen.values())):
            threading.Event().wait(0.05)
        gate.unlink()

    waiting = threading.Thread(target=open_gate, daemon=True)
    waiting.start()
    summary = runner.run_tables('mm1', ['first'], rows=['wide'], seeds=[10], pipeline=project.pipeline, report=False)
    waiting.join()
    assert summary.exit_code == 0, str(summary)
    status, numbers, _ = project.tracked()['wide']
    assert (status, numbers['loss']) == ('FINISHED', 1.5)


# --- the eye ----------------------------------------------------------------------------------------------------------------------------
def shown(folder):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160)
    display = Display(1, console)
    display.start('unit', folder)
    console.print(display.table())
    return console.file.getvalue()


def test_the_table_says_how_fast_and_how_long(tmp_path):
    ProgressFile(tmp_path)('training', step=100, steps=2500, loss=1.5)
    (tmp_path / PACE).write_text(
        '{"step": 90, "tokens_per_second": 1, "seconds_per_step": 9}\n'
        '{"step": 100, "tokens_per_second": 20480.3, "seconds_per_step": 1.5}\n{"step": 100, "held_out_loss/test": 2}\n'
    )
    assert '20,480' in shown(tmp_path) and '60 min' in shown(tmp_path)
    ProgressFile(tmp_path)('evaluating cell', step=100, steps=2500)
    assert '20,480' not in shown(tmp_path)


@pytest.mark.parametrize(
    'line', ['', '7', '[1]', '{"step": "x"}', '{"step": 1}', '{"step": 1, "seconds_per_step": "x"}', '{' * 9999]
)
def test_lines_of_another_shape_disturb_nobody(line, tmp_path):
    ProgressFile(tmp_path)('training', step=1, steps=2, loss=1.5)
    (tmp_path / PACE).write_bytes(b'\xff\n' + line.encode() + b'\n{"step": 2, "mfu"')
    assert 'training' in shown(tmp_path)
    assert all(parse_pace(json.dumps(found)) == found for found in read_pace(tmp_path))
    assert Following(tmp_path, 2).points() == []


def test_durations():
    assert [duration(s) for s in (5, 119, 120, 7199, 7200, 3e5)] == ['5 s', '119 s', '2 min', '120 min', '2 h', '3 d']


def test_the_picture_has_held_out_losses_and_the_rate(tmp_path):
    run(tmp_path, TALKS)
    drawn = curve_figure(read_curve(tmp_path / 'curve.csv'), read_pace(tmp_path))
    told = {text.get_text() for text in drawn.findobj(Text)}
    assert {'align', 'tune', 'held out: seen', 'held out: mixed', 'lr', 'loss', 'step'} <= told
    loss, rate = drawn.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [3, 5, 3, 3] and len(rate.lines) == 2


if __name__ == '__main__':
    SHARES = Machine(devices=2, shard='fsdp', log_every=2, eval_every=3, save_every=3)
    for paper in ('honeybee', 'owl3'):
        run(Path(sys.argv[1]) / paper, SHARES, paper=paper, dropout=0.0)
    torch.distributed.destroy_process_group()
