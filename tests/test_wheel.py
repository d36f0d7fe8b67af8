"An installed package outside any clone: it reads the papers that the wheel brought, writes into the present folder, and says what needs a clone."

import json, os, shutil, subprocess, sys, tarfile, tomllib, zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mllm_replica.cli import app
from mllm_replica.core import settings as module
from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import is_shipped, project_root, settings, work_folder
from mllm_replica.tables.published import load_paper

ROOT = Path(__file__).resolve().parent.parent


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def clear():
    for cached in project_root, settings:
        cached.cache_clear()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "As if this package had been installed from its wheel; the present folder is empty."
    package = tmp_path.resolve() / 'site-packages' / 'mllm_replica'
    for name in 'papers', 'nbs/pipelines':
        shutil.copytree(ROOT / name, package / '_data' / name)
    shutil.copy(ROOT / 'settings.ini', package / '_data')
    (tmp_path / 'mine').mkdir()
    monkeypatch.chdir(tmp_path / 'mine')
    for name in 'MLLM_REPLICA_ROOT', 'MLLM_REPLICA_RUNS':
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, 'PACKAGE', package)
    monkeypatch.setattr(module, 'SHIPPED', package / '_data')
    clear()
    yield package / '_data'
    monkeypatch.undo()
    clear()


def files_of(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_without_a_clone_the_shipped_papers_are_read_and_runs_lie_here(shipped, tmp_path, monkeypatch):
    before, mine = files_of(shipped), (tmp_path / 'mine').resolve()
    assert is_shipped() and (project_root(), work_folder()) == (shipped, mine)
    assert settings().run_folder == mine / 'runs' and settings().tracking_uri == f'sqlite:///{mine}/runs/mlflow.db'
    for words in ('papers',), ('tables', 'owl2'), ('show', 'honeybee', '3'), ('report', 'honeybee', '3'):
        result = call(*words)
        assert result.exit_code == 0 and len(result.output.splitlines()) > 4, result.output
    monkeypatch.setenv('MLLM_REPLICA_RUNS', str(tmp_path / 'elsewhere'))
    settings.cache_clear()
    assert settings().run_folder == tmp_path / 'elsewhere'
    assert files_of(shipped) == before and not list(mine.iterdir())


def test_what_needs_a_clone_says_so_in_a_line(shipped):
    for words in (
        ('verify',),
        ('verify', 'owl2', '--audit', '1'),
        ('run', 'honeybee', '3', '--scale', 'smoke', '--publish'),
    ):
        result = call(*words)
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1, result.output
        assert 'needs a clone of the project' in result.output


def test_a_unit_is_filed_under_no_commit_and_advice_is_for_an_installed_package(shipped):
    from mllm_replica.planning import doctor
    from mllm_replica.running.journal import git_commit

    assert git_commit() == ''
    assert doctor._install('vision') == "pip install 'mllm_replica[vision]'" and 'upgrade' in doctor._install()


@pytest.mark.parametrize(
    'words', [('papers',), ('report',), ('run', 'honeybee', '3'), ('plan', 'owl2'), ('ui',), ('verify',)]
)
def test_where_there_is_neither_every_command_says_what_to_do(shipped, words):
    shutil.rmtree(shipped)
    result = call(*words)
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1, result.output
    assert 'run inside a clone' in result.output and 'install the wheel' in result.output


def test_a_clone_of_another_package_is_refused(shipped, tmp_path, monkeypatch):
    clone = tmp_path / 'clone'
    (clone / 'papers').mkdir(parents=True)
    (clone / 'settings.ini').touch()
    (clone / 'mllm_replica').mkdir()
    (clone / 'mllm_replica' / '__init__.py').touch()
    monkeypatch.chdir(clone / 'papers')
    clear()
    result = call('papers')
    assert result.exit_code == 1 and 'has a package of its own' in result.output and 'pip install -e' in result.output


def test_licence_and_citation_agree_with_the_project():
    given = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    version = (ROOT / 'mllm_replica' / '__init__.py').read_text().split('"')[1]
    assert given['license'] == cited['license'] == 'Apache-2.0' and cited['version'] == version
    assert 'Apache License' in (ROOT / 'LICENSE').read_text().splitlines()[0]
    papers = {load_paper(paper).title: f'arXiv:{load_paper(paper).arxiv}' for paper in PAPERS}
    assert {entry['title']: entry['identifiers'][0]['value'] for entry in cited['references']} == papers


# --- the wheel itself -------------------------------------------------------------------------------------------------------------------
def run(*words, **kw):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def content(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if 'dist-info' not in name}


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A wheel made of the clone, the source distribution, and a wheel made of that."
    folder = tmp_path_factory.mktemp('built')
    build = folder / 'build'
    run(sys.executable, '-m', 'venv', build)
    run(build / 'bin' / 'pip', 'install', '--quiet', 'build', 'hatchling')
    for kinds, source, out in (['--wheel', '--sdist'], ROOT, 'clone'), (['--wheel'], None, 'sdist'):
        if source is None:
            with tarfile.open(next((folder / 'clone').glob('*.tar.gz'))) as file:
                file.extractall(folder, filter='data')
            source = next(folder.glob('mllm_replica-*'))
        run(build / 'bin' / 'python', '-m', 'build', '--no-isolation', *kinds, '--outdir', folder / out, source)
    return folder


@pytest.mark.nightly
def test_the_source_distribution_is_complete(built):
    first, second = (content(next((built / name).glob('*.whl'))) for name in ('clone', 'sdist'))
    assert first == second
    source = next(path for path in built.glob('mllm_replica-*') if path.is_dir())
    for name in 'nbs', 'papers', 'tests', 'mllm_replica':
        wanted = {p.relative_to(ROOT) for p in (ROOT / name).rglob('*') if p.is_file() and '__pycache__' not in p.parts}
        assert wanted <= {p.relative_to(source) for p in (source / name).rglob('*')}, name
    for name in 'settings.ini', 'pyproject.toml', 'Makefile', 'constraints.txt', 'LICENSE', 'CITATION.cff', 'README.md':
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.nightly
def test_the_installed_wheel_does_what_the_clone_does(built, tmp_path):
    bare, mine = tmp_path / 'bare', tmp_path / 'mine'
    mine.mkdir()
    run(sys.executable, '-m', 'venv', bare)
    run(bare / 'bin' / 'pip', 'install', '--quiet', '--no-deps', next((built / 'clone').glob('*.whl')))
    (site,) = bare.glob('lib/python*/site-packages')
    (site / 'zz_requirements.pth').write_text('\n'.join(p for p in sys.path if p.endswith('site-packages')))
    python, command = bare / 'bin' / 'python', bare / 'bin' / 'mllm-replica'
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('MLLM_REPLICA', 'PYTHON'))}
    where = dict(cwd=mine, env=kept)
    assert Path(run(python, '-c', 'import mllm_replica; print(mllm_replica.__file__)', **where)).is_relative_to(site)
    assert set(json.loads(run(command, 'tables', '--json', **where))) == set(PAPERS)
    for words in ('papers',), ('show', 'honeybee', '3'), ('plan', 'honeybee', '3'), ('report', 'honeybee', '3'):
        assert run(command, *words, **where)
    assert '1 units finished' in run(command, 'run', 'honeybee', '3', '--scale', 'smoke', '--row', 'cabs_144', **where)
    assert list(mine.glob('runs/units/*/result.json')) and [path.name for path in mine.iterdir()] == ['runs']
