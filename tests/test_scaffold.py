"The house rules that a machine can check: notebooks and package agree, files are small, code keeps its style, nothing names this machine."

import ast, configparser, difflib, io, json, os, re, shutil, subprocess, sys, tokenize, tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'mllm_replica'
LEFT_OUT = (
    '.venv',
    '.git',
    'runs',
    'build',
    '__pycache__',
    '*.egg-info',
    '.pytest_cache',
    '.ruff_cache',
    '.benchmarks',
    '.ipynb_checkpoints',
    '_proc',
    'mlruns',
    'mlflow.db',
    'results',
)


def name_of(path):
    return str(path.relative_to(ROOT))


@cache
def notebooks():
    "Path -> cells of every notebook, read once."
    return {path: json.loads(path.read_text())['cells'] for path in sorted((ROOT / 'nbs').rglob('*.ipynb'))}


@cache
def modules():
    "Path -> (source, syntax tree) of every module, read once."
    paths = sorted(path for path in PACKAGE.rglob('*.py') if path.name not in ('__init__.py', '_modidx.py'))
    sources = {path: path.read_text() for path in paths}
    return {path: (source, ast.parse(source)) for path, source in sources.items()}


def committed_files() -> list[Path]:
    "What git tracks or would track; every file of the folder where there is no git."
    try:
        shown = subprocess.run(
            ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z'],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        return [ROOT / f for f in shown.decode().split('\0') if f and (ROOT / f).is_file()]
    except (OSError, subprocess.CalledProcessError):
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        return [
            Path(d) / f
            for d, _, files in os.walk(ROOT)
            for f in files
            if not any(ignored(d, [part]) for part in Path(d, f).relative_to(ROOT).parts)
        ]


# --- settings ---------------------------------------------------------------------------------------------------------------------------
def test_settings_ini_equals_pyproject():
    ini = configparser.ConfigParser()
    ini.read(ROOT / 'settings.ini')
    toml = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / '__init__.py').read_text())[1]
    expected = dict(
        lib_name=toml['project']['name'],
        lib_path=toml['tool']['nbdev']['lib_path'],
        nbs_path=toml['tool']['nbdev']['nbs_path'],
        version=version,
        min_python=toml['project']['requires-python'].removeprefix('>='),
    )
    assert dict(ini['DEFAULT']) == expected


def test_constraints_pin_every_direct_dependency():
    toml = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']

    def canonical(name):
        return re.sub(r'[-_.]+', '-', name).lower()

    wanted = {
        canonical(re.match(r'[\w.-]+', r)[0]) for r in toml['dependencies'] + toml['optional-dependencies']['dev']
    }
    lines = [line for line in (ROOT / 'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+', line) for line in lines), (
        'a release number each, no build tag, no address'
    )
    assert wanted <= {canonical(line.split('==')[0]) for line in lines}


def test_parameters_tag_survives_cleaning():
    toml = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert 'tags' in toml['tool']['nbdev']['allowed_cell_metadata_keys']
    for name in ('replicate_row', 'report_table'):
        cells = notebooks()[ROOT / f'nbs/pipelines/{name}.ipynb']
        tagged = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1, f'{name}.ipynb has {len(tagged)} cells tagged `parameters`'
        assert not ''.join(tagged[0]['source']).startswith('#|'), f'{name}.ipynb: papermill does not know directives'


# --- drift ------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def exported_copy(tmp_path_factory) -> Path:
    "A copy of the tree in which the notebooks were exported and cleaned anew."
    copy = tmp_path_factory.mktemp('copy') / 'tree'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    for tool in ('nbdev-export', 'nbdev-clean'):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def differences(copy: Path, folder: str, pattern: str) -> str:
    "Unified diff, empty when all files below `folder` agree."
    found = []
    for name in sorted({str(p.relative_to(base)) for base in (ROOT, copy) for p in (base / folder).rglob(pattern)}):
        if '__pycache__' in name or '.ipynb_checkpoints' in name:
            continue
        old, new = [
            (base / name).read_text().splitlines() if (base / name).exists() else ['(no such file)']
            for base in (ROOT, copy)
        ]
        if old != new:
            found += list(difflib.unified_diff(old, new, name, f'{name} made anew', lineterm='', n=1))[:40]
    return '\n'.join(found)


def test_export_is_current(exported_copy):
    "`nbdev-export` changes nothing."
    diff = differences(exported_copy, 'mllm_replica', '*.py')
    assert not diff, f'run nbdev-export:\n{diff}'


def test_notebooks_are_clean(exported_copy):
    "`nbdev-clean` changes nothing."
    diff = differences(exported_copy, 'nbs', '*.ipynb')
    assert not diff, f'run nbdev-clean:\n{diff}'


def test_cell_ids_are_unique_and_exported():
    "`nbdev-update` finds its way back by cell id: each id in the package exists in the notebook that is named beside it."
    ids = {path: Counter(cell['id'] for cell in cells) for path, cells in notebooks().items()}
    lost = []
    for path, (source, _) in modules().items():
        for notebook, cell in re.findall(r'^# %% (\S+\.ipynb) #(\w+)$', source, re.M):
            times = ids[(path.parent / notebook).resolve()][cell]
            if times != 1:
                lost.append(f'{name_of(path)}: cell {cell} is in {notebook} {times} times')
    assert not lost, '\n'.join(lost)


# --- import ---------------------------------------------------------------------------------------------------------------
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    print(name, *set(sys.modules) - before)
"""


def test_what_is_to_start_quickly_loads_no_heavy_library():
    light = [
        'mllm_replica',
        'mllm_replica.core.settings',
        'mllm_replica.core.recipe',
        'mllm_replica.core.registry',
        'mllm_replica.cli',
    ]
    heavy = {'torch', 'transformers', 'mlflow', 'papermill', 'datasets', 'matplotlib', 'pandas'}
    command = [sys.executable, '-c', IMPORTED, *light]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {name: found for name, *found in map(str.split, said.splitlines())}
    assert list(loaded) == light
    assert not {name: heavy & set(found) for name, found in loaded.items() if heavy & set(found)}
    assert len(loaded['mllm_replica']) <= 5, 'the package itself imports nothing: ' + ' '.join(loaded['mllm_replica'])


# --- rooms ----------------------------------------------------------------------------------------------------------------
ROOMS = (  # a module imports from its own room and from those before it
    'core',
    'data',
    'models',
    'training',
    'scoring',
    'tables',
    'running',
    'planning',
    'owl2',
    'honeybee',
    'mm1',
    'eagle',
    'owl3',
    'auto',
    'evaluating',
    'demo',
    'commands',
    'cli',
)


def named(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports_of(path, tree):
    "Modules of the package that a module imports, at its top or within a function."
    known, package = {named(other) for other in modules()}, named(path).split('.')[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            yield from known & ({base} | {f'{base}.{alias.name}' for alias in node.names})


def test_no_import_runs_upwards():

    def room(name):
        return ROOMS.index(name.split('.')[1])

    up = [
        f'{named(path)} imports {other}'
        for path, (_, tree) in modules().items()
        for other in imports_of(path, tree)
        if room(other) > room(named(path))
    ]
    assert not up, '\n'.join(up)


def test_no_imports_run_in_a_circle():
    left = {named(path): set(imports_of(path, tree)) for path, (_, tree) in modules().items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f'in a circle, or above one: {sorted(left)}'


def registrations(source, tree):
    "What a module changes elsewhere when it is imported; making a model known to the Auto classes is all that may."
    own = {name.asname or name.name for node in tree.body if hasattr(node, 'names') for name in node.names}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
        for target in targets:
            root = target
            while isinstance(root, (ast.Subscript, ast.Attribute)):
                root = root.value
            changes = root is not target or isinstance(node, ast.AugAssign)
            if changes and isinstance(root, ast.Name) and root.id in own:
                yield node.lineno
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func).split('.')
            if called[0] in own and called[-1] != 'register':
                yield node.lineno
    yield from (number for number, line in enumerate(source.splitlines(), 1) if 'noqa: F401' in line)


def test_importing_a_module_changes_no_other():
    found = [
        f'{name_of(path)}:{number}'
        for path, (source, tree) in modules().items()
        for number in registrations(source, tree)
    ]
    assert not found, '\n'.join(found)


# --- size and style -------------------------------------------------------------------------------------------------------
def test_notebooks_are_small():
    assert not [name_of(path) for path in notebooks() if path.stat().st_size > 300 * 1024]


def lines_of_text(source):
    "Numbers of the lines that begin with a string, or lie within one: what cannot be broken."
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    strings = [t for t in tokens if t.type == tokenize.STRING]
    within = {number for t in strings for number in range(t.start[0] + 1, t.end[0] + 1)}
    return within | {t.start[0] for t in strings if not t.line[: t.start[1]].strip()}


def documented(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]


def test_modules_are_short_and_narrow():
    problems = []
    for path, (source, tree) in modules().items():
        lines, text = source.splitlines(), lines_of_text(source)
        length = len(lines) - sum((ast.get_docstring(node) or '').count('\n') for node in documented(tree))
        if length > 450:
            problems.append(f'{name_of(path)} has {length} lines besides what its docstrings say of parameters')
        code = [(number, line) for number, line in enumerate(lines, 1) if not line.startswith('__all__')]
        wide = [number for number, line in code if len(line) > 120 and number not in text]
        problems += [f'{name_of(path)}:{number} has more than 120 columns' for number in wide]
    assert not problems, '\n'.join(problems)


def test_most_functions_are_short():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for _, tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert lengths[int(0.9 * len(lengths))] <= 40 and lengths[-1] <= 80


def test_ruff_format_changes_nothing():
    command = [Path(sys.executable).with_name('ruff'), 'format', '--check', '--no-cache', '.']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f'run `ruff format`:\n{done.stdout[-2000:]}'


def definitions(tree):
    "(class or None, function or class) of a module and of its classes."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield None, node
        if isinstance(node, ast.ClassDef):
            yield from ((node, inner) for inner in node.body if isinstance(inner, (ast.FunctionDef, ast.ClassDef)))


def faults(owner, node, public):
    "What a definition lacks: a length that fits a screen or two; documentation and types where it is public."
    is_public = (owner or node).name in public and not node.name.startswith('_')
    if is_public and not ast.get_docstring(node) and not (owner and node.end_lineno == node.lineno):
        yield 'has no docstring'
    if isinstance(node, ast.ClassDef):
        return
    if (length := node.end_lineno - node.lineno + 1) > 80:
        yield f'has {length} lines'
    if not is_public:
        return
    if node.returns is None:
        yield 'has no return type'
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ('self', 'cls', 'ctx')]
    if bare and not owner:
        yield f'no type for {bare}'


def test_definitions_are_short_documented_and_typed():
    problems = []
    for path, (source, tree) in modules().items():
        listed = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
        public = set(ast.literal_eval(listed[1])) if listed else set()
        for owner, node in definitions(tree):
            name = f'{name_of(path)}: {owner.name + "." if owner else ""}{node.name}'
            problems += [f'{name} {fault}' for fault in faults(owner, node, public)]
    assert not problems, '\n'.join(problems)


def distrusted(node):
    "Whether a node unpickles, evaluates text or runs a stranger's code (`model.eval()` and `weights_only=True` do not)."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        imported = [a.name for a in node.names] + [getattr(node, 'module', None) or '']
        return {'pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve'} & {
            name.split('.')[0] for name in imported
        }
    if not isinstance(node, ast.Call):
        return False
    called, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
    if called == 'torch.load' and ast.unparse(options.get('weights_only', ast.Constant(False))) != 'True':
        return True
    return called in ('eval', 'exec', 'compile') or 'trust_remote_code' in options


def test_nothing_is_unpickled_evaluated_or_trusted():
    found = [
        f'{name_of(path)}:{node.lineno}: {ast.unparse(node)}'
        for path, (_, tree) in modules().items()
        for node in ast.walk(tree)
        if distrusted(node)
    ]
    assert not found, '\n'.join(found)


def test_committed_files_name_no_machine():
    "No home or temporary folder of somebody's machine, no registry address."
    machine = re.compile(r"""(?<![\w.])/(?:work|home|root|Users|tmp|opt|var|mnt)/[\w.]+""")
    registry = re.compile(r'(?:extra-)?index-url|find-links|://(?!127\.0\.0\.1|localhost)[\w.-]*:\d{2,5}/', re.I)
    found = []
    for path in committed_files():
        if path.suffix in ('.safetensors', '.png', '.parquet', '.gif', '.npy') or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
            if hit := machine.search(line) or registry.search(line):
                found.append(f'{path.relative_to(ROOT)}:{number}: {hit[0]}')
    assert not found, '\n'.join(found)


# --- README -----------------------------------------------------------------------------------------------------------------------------
def test_readme_is_generated_from_the_index():
    from mllm_replica.tables.readme import as_markdown

    text, pictures = as_markdown(ROOT / 'nbs/index.ipynb')
    assert (ROOT / 'README.md').read_text() == text, 'run `make readme`'
    for name, data in pictures.items():
        assert (ROOT / name).read_bytes() == data, f'{name}: run `make readme`'


def test_index_outputs_are_current():
    "The numbers in the index are those in the result files: its cells, run now, print what is stored."
    import nbformat
    from mllm_replica.tables.readme import executed

    stored = nbformat.read(ROOT / 'nbs/index.ipynb', 4)

    def texts(nb):
        return [
            {kind: data for kind, data in o.get('data', {}).items() if kind.startswith('text/markdown')}
            for c in nb.cells
            if c.cell_type == 'code'
            for o in c.outputs
        ]

    assert texts(executed(stored)) == texts(stored), 'the results changed: run `make readme`'


# --- one module, one notebook -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['08_writing-Copy1', 'elsewhere/a_copy'])
def test_a_second_notebook_of_a_module_is_refused(tmp_path, name):
    from mllm_replica.core.exporting import check_owner

    def clash(text, other):
        folder = tmp_path / 'nbs'
        for place, source in (('first', text), (name, other)):
            path = folder / f'{place}.ipynb'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(cells=[dict(cell_type='code', source=source)])))
        found = [path for path in folder.rglob('*.ipynb')]
        for path in found:
            check_owner(path, found)

    clash('#| default_exp a.one', '#| default_exp a.two\n#| export\nx = 1')
    clash('#| default_exp a.one', "text = '#| default_exp a.one'")
    for first, second in [
        ('#| default_exp a.one', '#| default_exp a.one'),
        ('#| default_exp a.one', '# | hide\n# | default_exp  a.one'),
        ('#| export a.one\nx = 1', '#| default_exp a.one'),
        ('#| export a.one\nx = 1', '#|exporti a.one\ny = 2'),
    ]:
        with pytest.raises(ValueError, match=r'both write a\.one; give one of them another default_exp'):
            clash(first, second)


def test_the_export_of_a_project_with_a_copied_notebook_fails(tmp_path):
    copy = tmp_path / 'tree'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT, 'papers', 'tests'))
    place = copy / 'nbs' / 'foundations' / 'core'
    shutil.copy(place / '08_writing.ipynb', place / '08_writing-Copy1.ipynb')
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    done = subprocess.run(
        [Path(sys.executable).with_name('nbdev-export')], cwd=copy, env=env, capture_output=True, text=True
    )
    assert done.returncode and 'both write core.writing' in done.stderr
