"The house rules that a machine can check: notebooks and package agree, files are small, code keeps its style, nothing names this machine."
import ast, configparser, difflib, json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/'mllm_replica'
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
LEFT_OUT = ('.venv', '.git', 'runs', 'build', '__pycache__', '*.egg-info', '.pytest_cache', '.ruff_cache', '.benchmarks', '.ipynb_checkpoints',
            '_proc', 'mlruns', 'mlflow.db', 'results')

names = lambda paths: [str(p.relative_to(ROOT)) for p in paths]


def committed_files() -> list[Path]:
    "What git tracks or would track; every file of the folder where there is no git."
    try:
        shown = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, check=True).stdout
        return [ROOT/f for f in shown.decode().split('\0') if f and (ROOT/f).is_file()]
    except (OSError, subprocess.CalledProcessError):
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        return [Path(d)/f for d, _, files in os.walk(ROOT) for f in files
                if not any(ignored(d, [part]) for part in Path(d, f).relative_to(ROOT).parts)]


# --- settings ---------------------------------------------------------------------------------------------------------------------------
def test_settings_ini_equals_pyproject():
    ini = configparser.ConfigParser(); ini.read(ROOT/'settings.ini')
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    version = re.search(r'__version__ = "(.+)"', (PACKAGE/'__init__.py').read_text())[1]
    expected = dict(lib_name=toml['project']['name'], lib_path=toml['tool']['nbdev']['lib_path'], nbs_path=toml['tool']['nbdev']['nbs_path'],
                    version=version, min_python=toml['project']['requires-python'].removeprefix('>='))
    assert dict(ini['DEFAULT']) == expected


def test_constraints_pin_every_direct_dependency():
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    canonical = lambda name: re.sub(r'[-_.]+', '-', name).lower()
    wanted = {canonical(re.match(r'[\w.-]+', r)[0]) for r in toml['dependencies'] + toml['optional-dependencies']['dev']}
    lines = [line for line in (ROOT/'constraints.txt').read_text().splitlines() if not line.startswith('#')]
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+', line) for line in lines), 'a release number each, no build tag, no address'
    assert wanted <= {canonical(line.split('==')[0]) for line in lines}


def test_parameters_tag_survives_cleaning():
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    assert 'tags' in toml['tool']['nbdev']['allowed_cell_metadata_keys']
    for name in ('replicate_row', 'report_table'):
        cells = json.loads((ROOT/f'nbs/pipelines/{name}.ipynb').read_text())['cells']
        tagged = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1, f'{name}.ipynb has {len(tagged)} cells tagged `parameters`'
        assert not ''.join(tagged[0]['source']).startswith('#|'), f'{name}.ipynb: papermill does not know directives'


# --- drift ------------------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def exported_copy(tmp_path_factory) -> Path:
    "A copy of the tree in which the notebooks were exported and cleaned anew."
    copy = tmp_path_factory.mktemp('copy')/'tree'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    env = {**os.environ, 'PYTHONPATH': str(copy)}
    for tool in ('nbdev-export', 'nbdev-clean'):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def differences(copy: Path, folder: str, pattern: str) -> str:
    "Unified diff, empty when all files below `folder` agree."
    found = []
    for name in sorted({str(p.relative_to(base)) for base in (ROOT, copy) for p in (base/folder).rglob(pattern)}):
        if '__pycache__' in name or '.ipynb_checkpoints' in name: continue
        old, new = [(base/name).read_text().splitlines() if (base/name).exists() else ['(no such file)'] for base in (ROOT, copy)]
        if old != new: found += list(difflib.unified_diff(old, new, name, f'{name} made anew', lineterm='', n=1))[:40]
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
    for module in MODULES:
        for notebook, cell in re.findall(r'^# %% (\S+\.ipynb) #(\w+)$', module.read_text(), re.M):
            path = (module.parent/notebook).resolve()
            ids = [c['id'] for c in json.loads(path.read_text())['cells']]
            assert ids.count(cell) == 1, f'{module.name}: cell {cell} is in {path.name} {ids.count(cell)} times'


# --- import -----------------------------------------------------------------------------------------------------------------------------
def python(code: str) -> str:
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_notebooks_that_register_worlds_give_the_packages_own_back():
    "nbdev-test runs many notebooks in one process; a world of a notebook has no source file for those that come after it."
    sources = {n.name: [''.join(c['source']) for c in json.loads(n.read_text())['cells'] if c['cell_type'] == 'code'] for n in NOTEBOOKS}
    register = {name: cells for name, cells in sources.items() if any(re.search(r'^WORLDS(\[| \|=)', cell, re.M) for cell in cells)}
    assert len(register) >= 4 and not [name for name, cells in register.items() if 'reload(import_module(' not in cells[-1]]


def test_import_is_quick_and_free_of_torch():
    timed = 'import time, sys; t = time.process_time(); import mllm_replica; print(time.process_time() - t, "torch" in sys.modules)'
    seconds, torch = min(python(timed).split() for _ in range(3))
    assert torch == 'False' and float(seconds) <= 0.3


@pytest.mark.parametrize('module', ['mllm_replica.cli', 'mllm_replica.settings', 'mllm_replica.recipe', 'mllm_replica.registry'])
def test_light_modules_load_no_heavy_library(module):
    loaded = python(f'import sys, {module}; print(*sys.modules)').split()
    assert not {'torch', 'transformers', 'mlflow', 'papermill', 'datasets', 'matplotlib'} & set(loaded)


# --- size and style ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_is_small(notebook):
    assert notebook.stat().st_size <= 300 * 1024


@pytest.mark.parametrize('module', MODULES, ids=names(MODULES))
def test_style(module):
    source = module.read_text()
    lines = source.splitlines()
    assert len(lines) <= 400, f'{len(lines)} lines'
    tree = ast.parse(source)
    public = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
    public = set(ast.literal_eval(public[1])) if public else set()
    problems = [f'line {i} has {len(line)} columns' for i, line in enumerate(lines, 1) if len(line) > 150 and not line.startswith('__all__')]
    for owner, node in [(None, n) for n in tree.body] + [(c, n) for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body]:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        name = f'{owner.name}.{node.name}' if owner else node.name
        is_public = (owner.name if owner else node.name) in public and not node.name.startswith('_')
        one_line_method = owner and node.end_lineno == node.lineno
        if is_public and not ast.get_docstring(node) and not one_line_method: problems.append(f'{name} has no docstring')
        if isinstance(node, ast.ClassDef): continue
        if (length := node.end_lineno - node.lineno + 1) > 80: problems.append(f'{name} has {length} lines')
        if is_public and node.returns is None: problems.append(f'{name} has no return type')
        arguments = [a for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg not in ('self', 'cls', 'ctx')]
        if is_public and not owner and (bare := [a.arg for a in arguments if a.annotation is None]): problems.append(f'{name}: no type for {bare}')
    assert not problems


@pytest.mark.parametrize('module', MODULES, ids=names(MODULES))
def test_nothing_is_unpickled_evaluated_or_trusted(module):
    "`eval(` as a call, pickles and remote code have no place in the package (`model.eval()` and `weights_only=True` have)."
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported = [a.name for a in node.names] + [getattr(node, 'module', None) or '']
            assert not {'pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve'} & {i.split('.')[0] for i in imported}, ast.unparse(node)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: k.value for k in node.keywords}
            assert called not in ('eval', 'exec', 'compile') and 'trust_remote_code' not in options, ast.unparse(node)
            if called == 'torch.load': assert ast.unparse(options.get('weights_only', ast.Constant(False))) == 'True', ast.unparse(node)


def test_committed_files_name_no_machine():
    "No home or temporary folder of somebody's machine, no registry address."
    machine = re.compile(r'''(?<![\w.])/(?:work|home|root|Users|tmp|opt|var|mnt)/[\w.]+''')
    registry = re.compile(r'(?:extra-)?index-url|find-links|://(?!127\.0\.0\.1|localhost)[\w.-]*:\d{2,5}/', re.I)
    found = []
    for path in committed_files():
        if path.suffix in ('.safetensors', '.png', '.parquet', '.gif', '.npy') or path == Path(__file__): continue
        for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
            if hit := machine.search(line) or registry.search(line): found.append(f'{path.relative_to(ROOT)}:{number}: {hit[0]}')
    assert not found, '\n'.join(found)


# --- README -----------------------------------------------------------------------------------------------------------------------------
def test_readme_is_generated_from_the_index():
    from mllm_replica.readme import as_markdown
    text, pictures = as_markdown(ROOT/'nbs/index.ipynb')
    assert (ROOT/'README.md').read_text() == text, 'run `make readme`'
    for name, data in pictures.items(): assert (ROOT/name).read_bytes() == data, f'{name}: run `make readme`'


def test_index_outputs_are_current():
    "The numbers in the index are those in the result files: its cells, run now, print what is stored."
    import nbformat
    from mllm_replica.readme import executed
    stored = nbformat.read(ROOT/'nbs/index.ipynb', 4)
    texts = lambda nb: [{kind: data for kind, data in o.get('data', {}).items() if kind.startswith('text/markdown')}
                        for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
    assert texts(executed(stored)) == texts(stored), 'the results changed: run `make readme`'
