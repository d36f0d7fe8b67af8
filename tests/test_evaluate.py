"A released checkpoint beside its published row: converted, asked on files as they are shipped, scored, recorded, tracked; whatever stops it."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from harnesses import POPE, save_tiny, write_tasks
from mlflow import MlflowClient
from shipped import SHIPPED, made
from test_convert import Official
from transformers import AutoProcessor
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import Trouble, project_root, settings
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.samples import IMAGE_MARK
from mllm_replica.evaluating import harness, rows, working
from mllm_replica.evaluating.checkpoints import checkpoint_hash
from mllm_replica.evaluating.jobs import Group, begin, group_of, prompts_of, scored
from mllm_replica.models.convert import convert
from mllm_replica.scoring.shipped.readers import reader_of
from mllm_replica.scoring.tasks import Theirs
from mllm_replica.tables.published import load_table, tables_of
from mllm_replica.tables.released import read_released

torch.set_num_threads(1)
WORDS = 400
BENCHMARKS = ('mme', 'mmbench', 'seed', 'pope')
CASES = {  # paper: form of the checkpoint; table and row; what of it can be asked on these files
    'honeybee': ('honeybee c-abs', '6', 'honeybee_c_7b', ['mmb', 'mme_p', 'mme', 'seed_i']),
    'owl2': ('owl2', '2', 'owl2', ['mme', 'seed']),
    'eagle': ('eagle', '6', 'eagle_x5_pa_13b', ['mme', 'mmb', 'seed', 'pope']),
    'owl3': ('owl3 adaptive', '4', 'owl3', ['pope']),
    'mm1': (None, '4', 'mm1_3b_chat', ['mme_p', 'mme_c', 'seed_all', 'seed_img', 'pope']),
}


def with_words(official):
    "The official model with room for a byte tokenizer's words."
    generator = torch.Generator().manual_seed(1)

    def grown(config):
        if not isinstance(config, dict):
            return config
        return {key: WORDS if key == 'vocab_size' else grown(value) for key, value in config.items()}

    for name, tensor in official.state.items():
        if name.endswith(('embed_tokens.weight', 'lm_head.weight')):
            more = torch.randn(WORDS - len(tensor), tensor.shape[1], generator=generator) * tensor.std()
            official.state[name] = torch.cat([tensor, more])
    official.config = grown(official.config)
    return official


def released(paper, folder):
    "A checkpoint of the paper: official if one of its size converts by itself, else converted here; MM1's is ours, for none is released."
    if paper == 'mm1':
        return save_tiny(paper, folder)
    official = with_words(Official(CASES[paper][0]))
    source, tokenizer = official.write(folder.with_name(f'{folder.name}-official')), byte_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>', '<|endoftext|>']})
    tokenizer.save_pretrained(source)
    if paper not in ('eagle', 'owl3'):
        return source
    assert not convert(source, folder, **official.settings).missing
    if paper == 'owl3':  # a mark of ordinary tokens, other ones in another tokenizer
        config = json.loads((folder / 'config.json').read_text())
        config['placeholder_ids'] = AutoProcessor.from_pretrained(folder).placeholder_ids
        (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Benchmarks as they are shipped, and a run folder; made once."
    root = tmp_path_factory.mktemp('evaluate')
    for name in BENCHMARKS:
        made(name, root / 'data' / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MLLM_REPLICA_RUNS', str(root / 'runs'))
        settings.cache_clear()
        yield root
    settings.cache_clear()


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def evaluate(paper, checkpoint, world, *words):
    _, table, row, columns = CASES[paper]
    return call('evaluate', paper, table, row, '--checkpoint', checkpoint, '--data', world / 'data', *words)


def lines(folder):
    "Predictions, whatever their order."
    return {path.name: sorted(path.read_text().splitlines()) for path in Path(folder).glob('*.jsonl')}


def job_of(world, paper, checkpoint, folder, **more):
    "A job of all benchmarks that lie here, in a folder of its own."
    given = dict(batch_size=8, workers=0, devices=1, limit=None) | more
    groups = [Group(task=name, split='dev' if name == 'mmbench' else 'test', prompt='letter') for name in BENCHMARKS]
    job = rows.job_of(checkpoint, world / 'data', {}, lambda *_: None, **given)
    return job.model_copy(update=dict(folder=world / folder, groups=groups))


def goes_all_the_way(paper, world):
    "Convert, ask, score, record, track, report; and nothing of it twice."
    checkpoint = released(paper, world / paper)
    _, table, row, columns = CASES[paper]
    found = evaluate(paper, checkpoint, world, '--json')
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    cells = {cell['column']: cell for cell in told['cells']}
    valued = [key for key, cell in cells.items() if cell['evaluated'] is not None]
    assert valued == columns and all(cells[key]['why'] for key in cells if key not in columns)
    assert told['checkpoint'] == checkpoint_hash(checkpoint)
    records = read_released(paper, table)
    assert [r.metric for r in records] == columns and {r.unit for r in records} == {f'checkpoint:{told["checkpoint"]}'}
    for record in records:
        cell = cells[record.metric]
        assert (record.value, record.n_eval) == (cell['evaluated'], cell['questions']) and record.n_eval > 10
        if cell['published'] is not None:
            assert cell['difference'] == pytest.approx(record.value - cell['published'])
            assert cell['verdict'] in ('match', 'near', 'differs')
    client = MlflowClient(settings().tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name(PAPERS[paper]).experiment_id])
    assert run.info.status == 'FINISHED' and run.data.tags['checkpoint'] == told['checkpoint']
    assert all(run.data.metrics[f'replicated/{r.metric}'] == r.value for r in records)
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {f'{table}.paper.checkpoints.csv', *lines(told['folder'])} <= kept
    shown = call('report', paper, table, '--scale', 'paper')
    assert told['checkpoint'][:12] in shown.output and shown.output.count(told['checkpoint'][:12]) == len(records)
    return checkpoint, told


def answers_do_not_depend(paper, world, checkpoint):
    "On the batch, on what stopped the asking, on how many processes ask."
    whole = job_of(world, paper, checkpoint, f'{paper}-whole')
    working.answer(whole)
    stopped = job_of(world, paper, checkpoint, f'{paper}-stopped', batch_size=1)

    def stop(name, done, total):
        if name.startswith('seed') and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        working.answer(stopped, stop)
    left = sum(len(begin(stopped, group).todo) for group in stopped.groups)
    assert 0 < left < sum(len(begin(whole, group).samples) for group in whole.groups)
    working.answer(stopped.model_copy(update=dict(batch_size=3)))
    together = job_of(world, paper, checkpoint, f'{paper}-together', devices=2, batch_size=2)
    working.answer(together)
    assert lines(whole.folder) == lines(stopped.folder) == lines(together.folder)
    said = {line for file in lines(whole.folder).values() for line in file}
    assert len({json.loads(line)['prediction'] for line in said}) > 3, 'different questions, different answers'
    for group in whole.groups:
        numbers = [scored(job, group).metrics for job in (whole, stopped, together)]
        assert numbers[0] == numbers[1] == numbers[2] and numbers[0]


def test_a_released_checkpoint_beside_its_row(world, monkeypatch):
    checkpoint, told = goes_all_the_way('honeybee', world)
    (ours,) = (settings().run_folder / 'converted').iterdir()
    assert ours.name.startswith(told['checkpoint'][:12]) and (ours / 'config.json').is_file()
    monkeypatch.setattr(working, 'load_saved', None)  # nothing is left to ask
    again = evaluate('honeybee', checkpoint, world, '--column', 'mmb', '--batch-size', '1')
    assert again.exit_code == 0 and 'recorded in' in again.output and len(read_released('honeybee', '6')) == 4
    answers = lines(told['folder'])
    words = ('--checkpoint', checkpoint, '--data', world / 'data', '--json')
    other = call('evaluate', 'honeybee', '5a', 'per_dataset', *words)  # of another table, by the same answers
    cells = {cell['column']: cell['evaluated'] for cell in json.loads(other.stdout)['cells']}
    assert list(cells) == ['mmb', 'seed_i', 'mme_p', 'avg_n'] and None not in cells.values()
    part = evaluate('honeybee', checkpoint, world, '--limit', '3', '--json')
    assert part.exit_code == 0 and json.loads(part.stdout)['results'] is None and lines(told['folder']) == answers


def test_whatever_stops_it(world):
    answers_do_not_depend('honeybee', world, released('honeybee', world / 'honeybee'))


@pytest.mark.nightly
@pytest.mark.parametrize('paper', [paper for paper in CASES if paper != 'honeybee'])
def test_every_paper(paper, world):
    checkpoint, _ = goes_all_the_way(paper, world)
    answers_do_not_depend(paper, world, checkpoint)


# --- from a column to a prompt --------------------------------------------------------------------------------------------
def test_every_column_becomes_prompts(world, tmp_path):
    "Of every benchmark that is read here, in every wording that a table asks for: words, options, and a mark for each picture."
    tables = [load_table(paper, name) for paper in PAPERS for name in tables_of(paper)]
    asked = [table.asked(table.rows[0].key, column.key) for table in tables for column in table.columns]
    groups = {group_of(what).name: group_of(what) for what in asked if what and what.task in SHIPPED}
    assert len(groups) > 25 and len({group.task for group in groups.values()}) > 10
    job = job_of(world, 'honeybee', save_tiny('honeybee', tmp_path / 'ours'), 'prompts', devices=1)
    job = job.model_copy(update=dict(data=tmp_path / 'data'))
    for group in groups.values():
        if not (job.data / group.task).is_dir():
            made(group.task, job.data / group.task)
        read = reader_of(group.task).read(job.data / group.task, group.split)
        for question, sample in zip(read, prompts_of(job, group, read), strict=True):
            said = sample['conversations'][0]['value']
            assert said.count(IMAGE_MARK) == len(question.images) == len(sample['images']), said
            wanted = [
                question.text.lower().partition('please')[0].replace(IMAGE_MARK, '').strip()[-6:],
                *question.options,
            ]
            assert all(str(part).lower() in said.lower() for part in wanted), (group.name, said, wanted)


# --- from an answer to a verdict ------------------------------------------------------------------------------------------
@pytest.fixture
def perfect(world, tmp_path, monkeypatch):
    "A project whose Table 6 prints what all right answers come to, and a checkpoint that gives them."
    shutil.copytree(project_root() / 'papers', tmp_path / 'papers', ignore=shutil.ignore_patterns('results'))
    shutil.copy(project_root() / 'settings.ini', tmp_path)
    path = tmp_path / 'papers' / 'honeybee' / 'tables' / 'table_6.yaml'
    table = yaml.safe_load(path.read_text())
    (row,) = [row for row in table['rows'] if row['key'] == 'honeybee_c_7b']
    row['values'] = dict(mmb=100.0, mme_p=1988, mme=2700, seed_i=None, llava_w=67.1)
    path.write_text(yaml.safe_dump(dict(table, claims=[], errata=[]), sort_keys=False))
    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(tmp_path))
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'runs'))
    (tmp_path / 'runs').mkdir()
    if (world / 'runs' / 'mlflow.db').exists():  # a new one takes its time
        shutil.copy(world / 'runs' / 'mlflow.db', tmp_path / 'runs')
    for cached in project_root, settings:
        cached.cache_clear()

    def right(model, processor, samples, **how):
        "Whatever the benchmark says is right."
        said = {q.id: q.answers[0] for name in BENCHMARKS for q in questions(world, name)}
        yield [(sample['id'], said[sample['id']]) for sample in samples]

    monkeypatch.setattr(working, 'answered', right)
    monkeypatch.setattr(working, 'load_saved', lambda folder: (None, None))
    yield tmp_path
    monkeypatch.undo()
    for cached in project_root, settings:
        cached.cache_clear()


def questions(world, name):
    return reader_of(name).read(world / 'data' / name, 'dev' if name == 'mmbench' else 'test')


def test_right_answers_get_their_verdicts(perfect, world):
    found = evaluate('honeybee', released('honeybee', perfect / 'checkpoint'), world)
    assert found.exit_code == 0, found.output
    said = {cells[0]: cells[1:] for line in found.output.splitlines() if len(cells := line.strip('│ ').split('│')) > 5}
    said = {name.strip(): [cell.strip() for cell in cells] for name, cells in said.items()}
    assert said['MMB'][:6] == ['100.0', '100.00', '+0.00', '±1', 'match', '11 of 4329']
    assert said['MME-P'][:5] == ['1988', '2000.00', '+12.00', '±15', 'match']
    assert said['MME'][:5] == ['2700', '2800.00', '+100.00', '±20', 'differs']
    assert said['SEED-I'][:5] == ['–', '100.00', '', '±0.5', 'not run'] and 'GPT-4 judge' in said['LLaVA-W'][4]
    report = call('report', 'honeybee', '6').output
    assert 'evaluated here' in report and report.count('match') == 2 and 'differs' in report
    told = json.loads(call('report', 'honeybee', '6', '--json').output)['honeybee']['tables']['6']['checkpoints']
    assert {cell['column']: cell['verdict'] for cell in told} == dict(
        mmb='match', mme_p='match', mme='differs', seed_i='not run'
    )
    words = ('--checkpoint', perfect / 'checkpoint-official', '--data', world / 'data', '--json', '--column', 'avg_n')
    mean = json.loads(call('evaluate', 'honeybee', '5a', 'per_dataset', *words).stdout)['cells'][-1]
    assert (mean['column'], mean['evaluated'], mean['questions']) == ('avg_n', 100.0, None)
    assert read_released('honeybee', '5a')[-1].value == 100.0
    assert not (perfect / 'papers' / 'honeybee' / 'results').exists(), 'only a person publishes'


def test_a_harness_asks_the_same_columns(perfect, world, monkeypatch):
    "Its numbers come in our units, stand beside those of the shipped files, and what it does not give is told."
    given = dict(mmbench_en_dev_static={'gpt_eval_score': 99.5}, mme={'mme_perception_score': 1900.0})
    asked = []

    def harnessed(model, tasks, **how):
        asked.append((tasks, how['include'], how['limit'], how['processes']))
        return {task: given.get(task, {'seed_image': 0.5}) for task in tasks}

    monkeypatch.setattr(harness, 'lmms_scores', harnessed)
    checkpoint = released('honeybee', perfect / 'checkpoint')
    found = evaluate('honeybee', checkpoint, world, '--lmms', '--include', perfect, '--devices', '2', '--json')
    assert found.exit_code == 0, found.output
    assert asked == [(['mmbench_en_dev_static', 'mme', 'seedbench'], perfect, None, 2)]
    cells = {cell['column']: cell for cell in json.loads(found.stdout)['cells']}
    assert {key: (cell['evaluated'], cell['verdict']) for key, cell in cells.items() if cell['evaluated']} == dict(
        mmb=(99.5, 'match'), mme_p=(1900.0, 'differs'), seed_i=(50.0, 'not run')
    )
    assert 'no harness gives total of mme' in cells['mme']['why']
    assert evaluate('honeybee', checkpoint, world, '--column', 'mmb').exit_code == 0
    both = {r.unit.partition(' by ')[2][:9]: r.value for r in read_released('honeybee', '6') if r.metric == 'mmb'}
    assert both == {'': 100.0, 'lmms-eval': 99.5}


# --- what is wrong is said --------------------------------------------------------------------------------------------
def test_what_cannot_be_evaluated_is_said_in_a_line(world, tmp_path):
    ours = save_tiny('honeybee', tmp_path / 'ours')
    (tmp_path / 'empty').mkdir()
    shutil.copytree(world / 'data' / 'mme', tmp_path / 'data' / 'mme')
    shutil.rmtree(next((tmp_path / 'data' / 'mme').rglob('existence')))
    for checkpoint, words, message in (
        (tmp_path / 'none', (), 'is no checkpoint'),
        (tmp_path / 'empty', (), 'is no checkpoint'),
        (ours, ('--column', 'llava_w'), 'GPT-4 judge'),
        (ours, ('--data', tmp_path / 'empty'), 'no files in'),
        (ours, ('--data', tmp_path / 'data'), 'has no subtask existence'),
    ):
        found = evaluate('honeybee', checkpoint, world, *words)
        assert found.exit_code == 1 and isinstance(found.exception, SystemExit), (words, found.exception)
        (line,) = [line for line in found.output.splitlines() if line.startswith('Error')]
        assert message in line, line
    picture = next((world / 'data' / 'mme').rglob('*.jpg'))
    shutil.copytree(world / 'data' / 'mme', tmp_path / 'torn' / 'mme')
    torn = tmp_path / 'torn' / picture.relative_to(world / 'data')
    torn.write_bytes(b'no picture')
    for workers in (0, 1):
        words = ('--data', tmp_path / 'torn', '--column', 'mme', '--batch-size', '1', '--workers', workers)
        found = evaluate('honeybee', ours, world, *words)
        assert found.exit_code == 1 and f'Error: mme: {torn}: not a readable' in found.output, found.output
    official = released('honeybee', tmp_path / 'honeybee')
    (official / 'tokenizer.json').unlink()
    found = evaluate('honeybee', official, world)
    assert found.exit_code == 1 and 'put the tokenizer of the released model beside its weights' in found.output


@pytest.mark.nightly
def test_a_process_that_fails_ends_the_others(world, tmp_path):
    "Its last line is told, and what the others have answered stays."
    job = job_of(world, 'honeybee', save_tiny('honeybee', tmp_path / 'ours'), 'failing', devices=2)
    (job.folder / 'work').mkdir(parents=True)
    (tmp_path / 'ours' / 'processor_config.json').unlink()
    with pytest.raises(Trouble, match='process . of 2 ended with code 1: .*cannot be loaded'):
        working.answer(job)
    assert not [*job.folder.glob('*.part*')]


@pytest.mark.nightly
def test_nothing_outlives_an_evaluation_that_is_killed(world, tmp_path):
    "Its processes end with it, its run is no longer said to be running, and it is gone on with."
    ours = save_tiny('owl2', tmp_path / 'ours')
    words = ['evaluate', 'honeybee', '6', 'honeybee_d_7b', '--checkpoint', str(ours), '--data', str(world / 'data')]
    code = 'import sys; from mllm_replica.cli import app; app(sys.argv[1:])'
    command = [sys.executable, '-c', code, *words, '--devices', '2', '--batch-size', '1']
    process = subprocess.Popen(command, env=os.environ | {'OMP_NUM_THREADS': '1'})
    folder = settings().run_folder / 'evaluations' / checkpoint_hash(ours)[:12]
    while not [*folder.glob('*.part*')]:
        assert process.poll() is None, 'ended before it could be killed'
        time.sleep(0.05)
    own = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(own, timeout=60)
    assert not [one for one in own if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    client = MlflowClient(settings().tracking_uri)
    place = [client.get_experiment_by_name(PAPERS['honeybee']).experiment_id]
    before = {run.info.run_id: run.info.status for run in client.search_runs(place, "tags.row = 'honeybee_d_7b'")}
    assert list(before.values()) == ['RUNNING']
    found = call(*words, '--json')
    assert found.exit_code == 0, found.output
    after = {run.info.run_id: run.info.status for run in client.search_runs(place, "tags.row = 'honeybee_d_7b'")}
    assert after == dict.fromkeys(before, 'FINISHED')


@pytest.mark.nightly
def test_lmms_eval_itself_asks_a_released_checkpoint(world, tmp_path, monkeypatch):
    "Converted, asked by the harness on data that lies here, its number in printed units; one process and two."
    lmms_eval = pytest.importorskip('lmms_eval')
    tasks = write_tasks(tmp_path / 'tasks')
    official = Path(lmms_eval.__path__[0]) / 'tasks' / 'pope' / 'pope.yaml'
    (tasks / 'pope.yaml').write_text(POPE.format(official=official, data=tasks / 'one.parquet'))
    monkeypatch.setattr(harness, 'theirs_of', lambda what: Theirs('local_pope', 'pope_accuracy,none'))
    checkpoint, values = released('honeybee', tmp_path / 'honeybee'), []
    for devices in (1, 2):
        words = [
            '--lmms',
            '--include',
            tasks,
            '--column',
            'accuracy',
            '--batch-size',
            3,
            '--devices',
            devices,
            '--json',
        ]
        found = call('evaluate', 'owl2', '9', 'random_owl2', '--checkpoint', checkpoint, *words)
        assert found.exit_code == 0, found.output
        told = json.loads(found.stdout)
        (cell,) = told['cells']
        values.append(cell['evaluated'])
        assert cell['verdict'] in ('match', 'near', 'differs') and cell['questions'] is None
        shutil.rmtree(Path(told['folder']) / 'lmms-eval')  # with the answers that it would go on with
    assert values[0] == values[1]
    (record,) = read_released('owl2', '9')
    assert ' by lmms-eval ' in record.unit and record.metric == 'accuracy'
