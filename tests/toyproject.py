"A project folder of its own with three small tables, and a pipeline whose units fail in every way that a notebook can."

import io, json, os, shutil, subprocess, sys, time, traceback
from pathlib import Path

import yaml

from mllm_replica.running.journal import Journal

HERE = Path(__file__).resolve().parent
PIPELINES = HERE.parent / 'nbs' / 'pipelines'
PARAMETERS = '\n'.join(
    f'{name}: {kind} = {default!r}'
    for name, kind, default in [
        ('paper', 'str', ''),
        ('table', 'str', ''),
        ('row', 'str', ''),
        ('scale', 'str', ''),
        ('seed', 'int', 0),
        ('out_dir', 'str', ''),
    ]
)
FAULT = """import os, signal, sys, time
from pathlib import Path
broken = Path(os.environ['TOY_FAULTS']).exists()
if row == 'raises' and broken: 1/0
if row == 'exits' and broken: sys.exit(0)
if row == 'killed' and broken: os.kill(os.getpid(), signal.SIGKILL)
if row == 'hangs' and broken: time.sleep(600)
while Path(os.environ.get('TOY_GATE', 'none')).exists(): time.sleep(0.1)"""
RESULT = """from mllm_replica.core.writing import write_atomic
from mllm_replica.running.engine import Metric, Result
from mllm_replica.core.recipe import Recipe
recipe = Recipe.model_validate_json((Path(out_dir)/'recipe.json').read_bytes())
numbers = dict(steps=1, train_seconds=1.0, seconds=1.0, peak_memory_mb=1.0)
result = Result(label=recipe.label, digest=recipe.digest(), metrics={'toy': Metric(value=0.5 + seed/100, n=10)}, versions={}, **numbers)
(Path(out_dir)/'curve.csv').write_text('step,stage,loss\\n1,joint,2.5\\n2,joint,1.5\\n')
write_atomic(Path(out_dir)/'result.json', result.model_dump_json())"""
LATE = "if row == 'late' and broken: 1/0"
DRIVER = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from mllm_replica.core import registry
registry.CHAPTERS['mm1'] = 'toychapter'
from mllm_replica.running.runner import run_tables
table, rows, pipeline = sys.argv[1], sys.argv[2].split(','), sys.argv[3]
summary = run_tables('mm1', [table], 'smoke', rows=rows, workers=2, pipeline=pipeline, report=False)
print(summary)
sys.exit(summary.exit_code)"""


def write_notebook(path, *cells, tags=('parameters',)):
    "A notebook of code cells; the first carries the tags."
    body = [
        dict(
            cell_type='code',
            id=f'cell{i}',
            execution_count=None,
            outputs=[],
            source=source,
            metadata=dict(tags=list(tags)) if i == 0 else {},
        )
        for i, source in enumerate(cells)
    ]
    kernel = dict(kernelspec=dict(name='python3', language='python', display_name='python3'))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=body, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return path


def with_chapter(project, after_training=None):
    "The real pipeline, with a cell before the others that makes the toy chapter known to the kernel, and perhaps one after training."
    cells = json.loads((PIPELINES / 'replicate_row.ipynb').read_text())
    known = "from mllm_replica.core import registry\nregistry.CHAPTERS['mm1'] = 'toychapter'"
    trains = next(i for i, c in enumerate(cells['cells']) if 'steps.fit(unit)' in ''.join(c['source']))
    for place, source in [(trains + 1, after_training), (0, known)]:
        if source:
            own = dict(cell_type='code', id=f'own{place}', execution_count=None, metadata={}, outputs=[], source=source)
            cells['cells'].insert(place, own)
    path = project.root / 'with_chapter.ipynb'
    path.write_text(json.dumps(cells))
    return path


def published_table(name, rows):
    own = dict(
        columns=[
            dict(key='toy', name='toy task', better='higher', max=1),
            dict(key='size', name='parameters', better='none'),
        ],
        stands_for=dict(acc='toy'),
    )
    return dict(
        paper='mm1',
        table=name,
        arxiv='0000.00000v1',
        title=f'Toy table {name}',
        source='made for a test',
        status='complete',
        columns=[dict(key='acc', name='Acc', better='higher', max=100)],
        rows=[dict(key=r, label=r, values=dict(acc=50.0 + 10 * i)) for i, r in enumerate(rows)],
        claims=[
            dict(
                id='order',
                statement='the second is better',
                test=f'{rows[1]}.acc > {rows[0]}.acc',
                scales=dict(tiny=dict(testable=True)),
            )
        ],
        replication=dict(tiny=own),
    )


def until(condition):
    "Wait for something that another process does; the test's own limit bounds it."
    while not condition():
        time.sleep(0.1)


class Project:
    "The folder and what a test asks of it."

    def __init__(self, root):
        self.root, self.runs, self.faults = root, root / 'runs', root / 'broken'
        self.pipeline = write_notebook(root / 'toy.ipynb', PARAMETERS, FAULT, RESULT, LATE)
        self.driver = root / 'driver.py'
        self.driver.write_text(DRIVER)
        self.environment = dict(
            MLLM_REPLICA_ROOT=str(root),
            TOY_FAULTS=str(self.faults),
            PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
            OMP_NUM_THREADS='1',
        )

    def events(self, *kinds):
        "(event, row) of the journal in order."
        return [
            (e['event'], e['label'].split('/')[2])
            for e in Journal(self.runs).read()[0]
            if e['event'] in kinds or not kinds
        ]

    def close_gate(self):
        "Units that are started with the returned setting wait until the file is gone."
        gate = self.root / 'gate'
        gate.touch()
        return gate, dict(TOY_GATE=str(gate))

    def start(self, *rows, table='faults', **environment):
        "The driver in a process of its own."
        command = [sys.executable, str(self.driver), table, ','.join(rows), str(self.pipeline)]
        environment = os.environ | self.environment | environment
        return subprocess.Popen(
            command, env=environment, cwd=self.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def tracked(self):
        "Row -> (status, metrics, tags) of the unit runs."
        from mllm_replica.running.tracking import Tracker

        client = Tracker(f'sqlite:///{self.runs}/mlflow.db', self.runs).client
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        return {r.data.tags.get('row', 'table'): (r.info.status, r.data.metrics, r.data.tags) for r in runs}


def make_project(root):
    from toychapter import recipes

    root.mkdir(parents=True, exist_ok=True)
    (root / 'settings.ini').write_text('[replication]\nscale = smoke\nseeds = 10 11\nworkers = 2\n')
    for name, rows in recipes.ROWS.items():
        path = root / 'papers' / 'mm1' / 'tables' / f'table_{name}.yaml'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(published_table(name, rows)))
    shutil.copytree(PIPELINES, root / 'nbs' / 'pipelines')
    return Project(root)


class Inline:
    "What `start_job` returns, for a notebook whose cells are executed here and now instead of in a kernel."

    def __init__(self, job, log, env, keep_open=()):
        self.pid, self.stdin = os.getpid(), io.BytesIO()
        with open(log, 'a') as self.log:
            self.returncode = self.execute(job)
        shutil.copy(job.notebook, job.output)

    def execute(self, job):
        "0, or 1 where a cell raised; the log tells of it as the engine's own does."
        names = {}
        for number, cell in enumerate(json.loads(job.notebook.read_text())['cells'], 1):
            if cell['cell_type'] != 'code':
                continue
            print(f'Executing Cell {number}' + '-' * 40, file=self.log)
            try:
                exec(''.join(cell['source']), names)
            except Exception as error:
                print(
                    *traceback.format_exc().splitlines(),
                    f'cell {number} raised {type(error).__name__}: {error}',
                    sep='\n',
                    file=self.log,
                )
                return 1
            if 'parameters' in cell['metadata'].get('tags', ()):
                names |= job.parameters.model_dump()
        return 0

    def poll(self):
        return self.returncode
