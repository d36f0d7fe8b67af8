"What is no fault of the program: said in one line that says what to do, by whatever command meets it, and nothing is left lying about."

import errno, http.server, io, json, os, socket, sqlite3, subprocess, sys, tarfile, threading, time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core.recipe import Source
from mllm_replica.core.settings import Trouble, settings
from mllm_replica.data import sources
from mllm_replica.data.sources import data_files, load_source
from mllm_replica.running.engine import is_alive, this_process
from mllm_replica.running.journal import Journal, data_hash
from mllm_replica.running.store import TrackerError
from mllm_replica.running.tracking import Tracker


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def one_line(result):
    "The single line of a command that could not go on."
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    (line,) = [line for line in result.output.splitlines() if line]
    assert line.startswith('Error: ')
    return line


# --- trackers ---------------------------------------------------------------------------------------------------------------------------
class Server:
    "Answers every question in one way."

    def __init__(self, code, body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.send_response(code)
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.uri = f'http://127.0.0.1:{self.server.server_port}'


@pytest.fixture
def silent():
    "A port that takes a connection and says nothing."
    with socket.create_server(('127.0.0.1', 0)) as listening:
        yield f'http://127.0.0.1:{listening.getsockname()[1]}'


@pytest.fixture
def closed():
    with socket.create_server(('127.0.0.1', 0)) as listening:
        port = listening.getsockname()[1]
    return f'http://127.0.0.1:{port}'


def said_of(uri):
    with pytest.raises(TrackerError) as caught:
        Tracker(uri, Path('unused'))
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    'code, body, found',
    [(503, b'', 'too many 503'), (200, b'<html>', 'not in a valid JSON format'), (401, b'who?', '401')],
)
def test_what_is_no_tracker_is_told_at_once(code, body, found):
    line = said_of(Server(code, body).uri)
    assert found in line and 'leave tracking_uri in settings.ini empty' in line


def test_a_tracker_that_is_not_there_is_told_with_the_local_way_out(silent, closed, project, monkeypatch):
    before = dict(os.environ)
    assert 'no answer within 4 s' in said_of(silent)
    assert 'Connection refused' in said_of(closed) and 'Name or service' in said_of('http://nowhere.invalid:5000')
    assert os.environ.get('MLFLOW_HTTP_REQUEST_MAX_RETRIES') == before.get('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
    assert 'secret' not in said_of(closed.replace('//', '//user:secret@'))
    (project.root / 'settings.ini').write_text(
        f'[replication]\nscale = smoke\nseeds = 10\nworkers = 1\ntracking_uri = {closed}\n'
    )
    settings.cache_clear()
    project.faults.touch()
    line = one_line(call('run', 'mm1', 'faults', '--row', 'good'))
    assert closed in line and 'mlflow.db of the run folder' in line and not project.events()
    ill = call('doctor')
    assert ill.exit_code == 1 and 'Connection refused' in ill.output


def damage(kind, file):
    "Make a database unusable; what holds it, if anything must."
    if kind == 'no database':
        file.write_bytes(b'not a database' * 1000)
        return None
    database = sqlite3.connect(file, isolation_level=None)
    database.execute('CREATE TABLE runs (text)')
    database.execute('BEGIN')
    database.executemany('INSERT INTO runs VALUES (?)', [(f'{i}' * 50,) for i in range(2000)])
    database.execute('COMMIT')
    if kind == 'locked':
        database.execute('BEGIN EXCLUSIVE')
        return database
    database.close()
    content = bytearray(file.read_bytes())
    if kind == 'cut':
        del content[len(content) // 2 :]
    else:
        content[4096:12288] = os.urandom(8192)
    file.write_bytes(content)


@pytest.mark.parametrize(
    'kind, advice',
    [
        ('no database', 'move the file away'),
        ('cut', 'move the file away'),
        ('overwritten', 'move the file away'),
        ('locked', 'another program is writing to it'),
    ],
)
def test_a_database_that_cannot_be_used_is_told_by_every_command(project, kind, advice):
    project.runs.mkdir()
    file = project.runs / 'mlflow.db'
    held = damage(kind, file)
    for words in ('run', 'mm1', 'faults', '--row', 'good'), ('ui',):
        line = one_line(call(*words))
        assert str(file) in line and advice in line
    from mllm_replica.planning.doctor import tracker

    found = tracker()
    assert found.state == 'fail' and str(file) in found.found and advice in found.advice
    assert call('tables', 'mm1').exit_code == 0 and not project.events()
    if held:
        held.close()


def test_a_database_that_fails_later_is_told_in_one_line_too(tmp_path):
    uri = f'sqlite:///{tmp_path}/mlflow.db'
    with Tracker(uri, tmp_path) as tracker:
        tracker.client.search_experiments()
        with closing(sqlite3.connect(tmp_path / 'mlflow.db')) as database:
            database.executescript('DROP TABLE experiment_tags; DROP TABLE experiments')
        with pytest.raises(TrackerError, match='no such table'):
            tracker.experiment('owl2')


# --- files ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_must_not_be_written_is_told(project, monkeypatch, number):
    def refused(self, *args, **kw):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, 'mkdir', refused)
    line = one_line(call('run', 'mm1', 'faults', '--row', 'good'))
    assert str(project.runs) in line and os.strerror(number) in line and 'MLLM_REPLICA_RUNS' in line
    ill = call('doctor')
    assert ill.exit_code == 1 and os.strerror(number) in ill.output


def test_a_file_in_the_way_of_the_run_folder_is_told(project):
    project.runs.write_text('in the way')
    assert 'MLLM_REPLICA_RUNS' in one_line(call('run', 'mm1', 'faults', '--row', 'good'))


@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'a,b\n1,2\n', b'row,"open', b'\x00' * 50])
def test_damaged_results_are_told(project, content):
    file = project.runs / 'results' / 'mm1' / 'faults.tiny.csv'
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert str(file) in one_line(call('report', 'mm1', 'faults'))


@pytest.mark.parametrize(
    'content, found',
    [
        (b'x' * 2**21, 'more than 1,048,576 bytes'),
        (b'a: &a [1]\nb: [*a, *a]', 'an alias'),
        (b'[' * 5000, 'more than 50 levels'),
        (b'{' * 5000, 'more than 50 levels'),
        (b'a: 1\na: 2', 'given more than once'),
        (b'!!python/object/apply:os.getcwd []', 'could not determine a constructor'),
        (b'\xff\xfe\x00', 'invalid'),
        (b'- 1', 'faults'),
        (b'', 'faults'),
    ],
)
def test_a_table_that_is_none_is_told(project, content, found):
    file = project.root / 'papers' / 'mm1' / 'tables' / 'table_faults.yaml'
    file.write_bytes(content)
    line = one_line(call('show', 'mm1', 'faults'))
    assert str(file) in line and found in line


def test_canaries_are_read_with_the_same_limits(project):
    from mllm_replica.running.verify import _calls

    file = project.root / 'papers' / 'mm1' / 'canaries.yaml'
    file.write_text('# none\n')
    assert [name for _, _, name, _, _ in _calls('mm1')] == ['resumed']  # what every paper has
    file.write_text('x' * 2**21)
    with pytest.raises(Trouble, match='canaries.yaml has more than'):
        _calls('mm1')


# --- data that point elsewhere, or do not fit -------------------------------------------------------------------------------------------
@pytest.fixture
def root(tmp_path):
    "A data root with one good source, and a secret beside the root."
    turns = [{'from': 'human', 'value': 'say hi'}, {'from': 'gpt', 'value': 'hi'}]
    line = json.dumps(dict(id='a', images=[], conversations=turns))
    for folder in 'secret', 'data/good', 'data/linked', 'data/pipes':
        (tmp_path / folder).mkdir(parents=True)
    for folder in 'secret', 'data/good':
        (tmp_path / folder / 'train.jsonl').write_text(line)
    (tmp_path / 'data' / 'linked' / 'train.jsonl').symlink_to(tmp_path / 'secret' / 'train.jsonl')
    (tmp_path / 'data' / 'folder').symlink_to(tmp_path / 'secret')
    (tmp_path / 'data' / 'one.jsonl').symlink_to(tmp_path / 'secret' / 'train.jsonl')
    (tmp_path / 'data' / 'loop').symlink_to('loop')
    os.mkfifo(tmp_path / 'data' / 'pipes' / 'train.jsonl')
    (tmp_path / 'data' / 'good' / 'inner.jsonl').symlink_to('train.jsonl')
    return tmp_path / 'data'


@pytest.mark.parametrize(
    'given',
    [
        dict(name='linked'),
        dict(name='folder'),
        dict(name='one.jsonl'),
        dict(name='loop'),
        dict(name='pipes'),
        dict(name='../secret'),
        dict(name='good/../../secret'),
        dict(name='good', split='../../secret/train'),
        dict(name='good', split='..'),
        dict(name='good', split='/etc'),
        dict(name='good', split='*'),
        dict(name='good', split='tr[a]in'),
    ],
)
def test_no_part_of_a_source_leads_outside_the_data_root(root, given):
    source = Source(kind='folder', **given)
    for read in data_files, lambda source, root: load_source(source, 0, root):
        with pytest.raises(ValueError, match='leads outside the data root|no plain name|leads nowhere|no regular file'):
            read(source, root)


def test_a_split_has_a_name():
    with pytest.raises(ValueError, match='at least 1 character'):
        Source(kind='folder', name='good', split='')


def test_absolute_names_and_names_that_are_hashed_are_refused(root):
    from mllm_replica.core.recipe import Recipe

    with pytest.raises(ValueError, match='is absolute'):
        data_files(Source(kind='folder', name=str(root.parent / 'secret')), root)
    assert [file.name for file in data_files(Source(kind='folder', name='good', split='inner'), root)] == [
        'inner.jsonl'
    ]
    recipe = Recipe(
        paper='mm1',
        table='3',
        row='r',
        scale='smoke',
        seed=0,
        model={},
        stages=(),
        benchmarks=(),
        sources={'own': Source(kind='folder', name='../secret')},
    )
    with pytest.raises(ValueError, match='leads outside the data root'):
        data_hash(recipe, root)


@pytest.mark.parametrize('kind, name', [('world', 'tiles'), ('easy_vqa', 'easy_vqa')])
def test_the_split_of_a_made_source_is_a_plain_name_too(kind, name):
    with pytest.raises(ValueError, match='no plain name'):
        load_source(Source(kind=kind, name=name, split='../../x', size=1), 0)


def shard(path, *members):
    with tarfile.open(path, 'w') as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def test_members_of_a_shard_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, 'MEMBER_BYTES', 1000)
    monkeypatch.setattr(sources, 'SAMPLE_BYTES', 2500)
    source = Source(kind='tar', name='x.tar')
    shard(tmp_path / 'x.tar', ('a.json', b'{}'), ('a.png', b'x' * 1001))
    with pytest.raises(ValueError, match='x.tar: a.png has 1,001 bytes'):
        list(sources.read_files(source, tmp_path))
    shard(tmp_path / 'x.tar', *[(f'a.{i}.png', b'x' * 900) for i in range(3)])
    with pytest.raises(ValueError, match='before it 2,700'):
        list(sources.read_files(source, tmp_path))


def test_a_member_that_only_says_that_it_is_large_is_refused(tmp_path):
    member = tarfile.TarInfo('a.png')
    member.size = 2**40
    (tmp_path / 'x.tar').write_bytes(member.tobuf())
    with pytest.raises(ValueError, match='a.png has 1,099,511,627,776 bytes'):
        list(sources.read_files(Source(kind='tar', name='x.tar'), tmp_path))


# --- processes and clocks ---------------------------------------------------------------------------------------------------------------
def test_a_zombie_is_dead():
    child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    named = this_process() | dict(pid=child.pid, started=psutil.Process(child.pid).create_time())
    old = {key: value for key, value in named.items() if key != 'booted'}  # as journals of before name it
    assert is_alive(named) and is_alive(old)
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_alive(named) and not is_alive(old)
    child.wait()
    assert not is_alive(named)


@pytest.mark.parametrize('step', [-86400, -3, 3, 3600])
def test_a_clock_that_was_set_kills_nobody(monkeypatch, step):
    named, boot = this_process(), psutil.boot_time()
    assert not is_alive(named | dict(started=named['started'] + step))  # another process of that number
    create = psutil.Process.create_time
    monkeypatch.setattr(psutil, 'boot_time', lambda: boot + step)
    monkeypatch.setattr(psutil.Process, 'create_time', lambda self: create(self) + step)
    assert is_alive(named) and is_alive(this_process())


@pytest.mark.parametrize('pid', [0, -1, 2**31, 2**70, True, '1', None])
def test_what_names_no_process_is_an_error(pid):
    with pytest.raises(ValueError):
        is_alive(this_process() | dict(pid=pid))


# --- the journal ------------------------------------------------------------------------------------------------------------------------
GOOD = dict(time=1.5, event='started', label='a', unit_key='k', process=dict(pid=1, started=0.0, host='elsewhere'))
STRANGE = [
    '[1, 2]',
    '"started"',
    '7',
    'null',
    'NaN',
    '{}',
    '[' * 5000,
    json.dumps({'event': 'started'}),
    json.dumps(GOOD | {'unit_key': ['k']}),
    json.dumps(GOOD | {'label': None}),
    json.dumps(GOOD | {'event': 3}),
    json.dumps(GOOD | {'time': 'noon'}),
    json.dumps(GOOD | {'process': None}),
    json.dumps(GOOD | {'process': 'me'}),
    json.dumps(GOOD | {'process': {'pid': 1}}),
    json.dumps(GOOD | {'process': GOOD['process'] | {'pid': 'one'}}),
    json.dumps({key: value for key, value in GOOD.items() if key != 'unit_key'}),
    json.dumps({key: value for key, value in GOOD.items() if key != 'label'} | {'unit': 'a'}),
    '{"time": 1, "eve',
    '\x00\x00',
]


def test_lines_of_another_shape_are_reported_and_passed_over(tmp_path):
    journal = Journal(tmp_path)
    journal.append('started', **{key: GOOD[key] for key in ('label', 'unit_key', 'process')})
    with open(journal.path, 'a') as file:
        file.write('\n'.join(STRANGE) + '\n')
    journal.append('untracked', label='a', reason='full')
    events, broken = journal.read()
    assert [event['event'] for event in events] == ['started', 'untracked']
    assert broken == list(range(2, 2 + len(STRANGE)))
    assert journal.reconcile() == [] and list(journal.last()) == ['k']


def test_a_run_says_which_lines_it_passes_over(project, inline):
    project.runs.mkdir()
    (project.runs / 'journal.jsonl').write_text('\n'.join(STRANGE[:7]) + '\n')
    result = call('run', 'mm1', 'faults', '--row', 'good')
    assert 'lines 1, 2, 3, 4, 5 … are no events and are passed over' in result.output, result.output


@pytest.mark.parametrize(
    'content', ['[1]', '7', '{"loss": "nan", "steps": 3}', '{"phase": 3, "step": 1, "steps": [2]}']
)
def test_progress_of_another_shape_disturbs_nobody(tmp_path, content):
    from mllm_replica.running.progress import Display

    (tmp_path / 'progress.json').write_text(content)
    display = Display(1)
    display.start('unit', tmp_path)
    assert display.table().row_count == 1


# --- full disks -------------------------------------------------------------------------------------------------------------------------
def write_text(folder):
    from mllm_replica.core.writing import write_atomic

    write_atomic(folder / 'seal.json', 'new')


def write_features(folder):
    import torch

    from mllm_replica.models.vision import FeatureCache

    FeatureCache.compute(folder, 'key', ['a'], lambda names: names, lambda images: torch.ones(len(images), 2, 3))


def write_checkpoint(folder, step=1):
    import torch

    from mllm_replica.training.checkpoint import save_checkpoint

    save_checkpoint(folder, step, {'model.a': torch.ones(3)}, {})


def write_curve(folder):
    from mllm_replica.training.checkpoint import Curve

    Curve(folder / 'curve.csv', 0)


def write_progress(folder):
    from mllm_replica.running.progress import ProgressFile

    ProgressFile(folder)('training')


def write_world(folder):
    load_source(Source(kind='world', name='tiles', size=2), 0)


def write_cache(folder):
    load_source(Source(kind='folder', name='good'), 0, folder.parent / 'data')


def full(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    'write, places',
    [
        (write_text, ['os.fsync', 'os.replace']),
        (write_features, ['os.fsync', 'os.rename', 'mllm_replica.models.vision.json.dump']),
        (write_checkpoint, ['os.fsync', 'mllm_replica.training.checkpoint.save_file', 'pathlib.Path.rename']),
        (write_curve, ['os.fsync', 'os.replace']),
        (write_progress, ['pathlib.Path.write_text', 'os.replace']),
        (write_world, ['pyarrow.parquet.write_table', 'os.replace']),
        (write_cache, ['datasets.arrow_writer.ArrowWriter.write', 'os.replace']),
    ],
)
def test_a_full_disk_leaves_nothing_behind(root, monkeypatch, write, places):
    folder = root.parent / 'runs'
    folder.mkdir()
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(folder))
    settings.cache_clear()
    try:
        for place in places:
            with monkeypatch.context() as patched:
                patched.setattr(place, full)
                with pytest.raises(OSError, match='No space left|no room'):
                    write(folder)
            assert not [
                path for path in folder.rglob('*') if not path.is_dir() or path.name.startswith(('.', 'part-'))
            ], place
        write(folder)
        left = [path for path in folder.rglob('*') if path.is_file()]
        assert left and not [path for path in left if path.name.startswith('.')]
    finally:
        settings.cache_clear()


def test_a_checkpoint_that_is_replaced_survives_a_full_disk(tmp_path, monkeypatch):
    from mllm_replica.training.checkpoint import load_latest

    write_checkpoint(tmp_path)
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith('.partial'):
            full()
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', refuse)
    with pytest.raises(OSError, match='no room'):
        write_checkpoint(tmp_path)
    assert load_latest(tmp_path).step == 1 and [path.name for path in tmp_path.iterdir()] == ['step-00000001']


def test_a_journal_line_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'write', lambda fd, content: len(content) // 2)
    with pytest.raises(OSError, match='No space left'):
        Journal(tmp_path).append('untracked', label='a')
