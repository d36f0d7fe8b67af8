"""Two checkouts side by side, the ledger, and the history of result lines."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mllm_replica
from mllm_replica.core import settings as settings_module
from mllm_replica.core.keys import reach
from mllm_replica.core.registry import PAPERS
from mllm_replica.running import verify as verification
from mllm_replica.tables.published import load_table, tables_of
from mllm_replica.tables.results import read_results
from mllm_replica.tables.validity import read_ledger, stale

PACKAGE = Path(mllm_replica.__file__).parent
ROOT = Path(__file__).resolve().parent.parent
CANARY = ('owl3', '8', 'concat', 'smoke', 10)


def git(*words: str, root: Path = ROOT) -> str:
    "What git says; tests that ask for the history are skipped where there is none."
    name = ('-c', 'user.name=a', '-c', 'user.email=a@b')
    return subprocess.run(['git', '-C', str(root), *name, *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def house(tmp_path, monkeypatch):
    "The project in a repository of its own, which tests may change; this process works in it."
    for folder in ('mllm_replica', 'papers'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    (tmp_path / '.gitignore').write_text('runs/\n__pycache__/\n')
    git('init', '-q', root=tmp_path)
    commit(tmp_path)
    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(tmp_path))

    def clear():
        return [f.cache_clear() for f in (settings_module.project_root, settings_module.settings)]

    clear()
    yield tmp_path
    monkeypatch.undo()
    clear()


def commit(root: Path) -> None:
    git('add', '-A', root=root)
    git('commit', '-qm', 'x', root=root)


def edit(root: Path, name: str, old: str, new: str) -> None:
    (file,) = (root / 'mllm_replica').rglob(f'{name}.py')
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def checked(root: Path) -> tuple[int, str]:
    "Exit code and words of `verify owl3 --check`, by the code of that folder."
    command = [sys.executable, '-c', 'from mllm_replica.cli import app; app()', 'verify', 'owl3', '--check']
    env = os.environ | {'PYTHONPATH': str(root), 'MLLM_REPLICA_ROOT': str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_message_and_an_unused_helper_leave_results_valid(house):
    edit(house, 'vlm', 'raise ValueError(f', 'raise ValueError("model: " f')
    edit(house, 'packing', '\n\n\ndef ', '\n\n\ndef nobody(x):\n    return x\n\n\ndef ')
    assert checked(house) == (0, 'all published values are valid\n')


def test_a_moved_number_makes_rows_stale_and_a_verified_change_does_not(house):
    edit(house, 'loss', 'grad_output * ctx.scale', 'grad_output * (ctx.scale + 1e-6)')
    code, words = checked(house)
    assert code == 1 and 'owl3/8/concat at tiny: the code has changed and is not verified' in words
    found = verification.verify(['owl3'], 'HEAD', quick=True, only=[CANARY])
    assert found and not any(f.valid for f in found) and '8/concat' in {row for f in found for row in f.rows}
    assert all('weights' in f.differs['/'.join(map(str, CANARY))] for f in found)

    lines = len(read_ledger('owl3'))
    edit(house, 'loss', 'grad_output * (ctx.scale + 1e-6)', 'ctx.scale * grad_output')
    assert all(f.valid for f in verification.verify(['owl3'], 'HEAD', quick=True, only=[CANARY]))
    assert len(read_ledger('owl3')) == lines  # nobody could check out what was verified
    commit(house)
    found = verification.verify(['owl3'], 'HEAD~1', quick=True, only=[CANARY])
    assert len(read_ledger('owl3')) == lines + len(found) and checked(house)[0] == 0


def test_what_no_canary_ran_stays_stale(house):
    edit(house, 'loss', 'grad_output * ctx.scale', 'ctx.scale * grad_output')
    commit(house)
    found = verification.verify(
        ['owl3'], 'HEAD~1', quick=True, only=[('owl3', 'fig1a', 'owl3', 'smoke', 10)]
    )  # trains nothing
    assert all(f.uncovered and not f.valid for f in found)
    assert 'no verification ran _ChunkedCrossEntropy.backward' in checked(house)[1]


def test_canaries_execute_nothing_that_their_rows_are_not_keyed_by():
    "What a unit runs is in its row's reach, or it writes the recipe, or it is no matter of numbers."
    aside = (
        'core.',
        'running.',
        'tables.',
        'data.worlds.',
        'training.tiny',
        'models.backbones',
    )  # the last two: recipes
    recipes = {
        verification._name(recipe): recipe for paper in PAPERS for recipe in verification.canaries(paper, True)[:1]
    }
    (seen,) = verification.observe_all([ROOT], list(recipes))
    for unit, recipe in recipes.items():
        tree = seen.tree(recipe.paper)
        ran = verification.executed(tree, [tuple(place) for place in seen.units[unit]['ran']])
        written = tree.reached([(f'mllm_replica.{recipe.paper}.recipes', 'recipe')], [recipe.table, recipe.scale])
        keyed = {part.name for part in (*reach(recipe, tree), *written)}
        ran = {(part.module, part.name) for part in ran if part.is_function}
        missed = [(module, name) for module, name in sorted(ran) if name not in keyed]
        assert [part for part in missed if not part[0].removeprefix('mllm_replica.').startswith(aside)] == []
        assert any(module.startswith(f'mllm_replica.{recipe.paper}.') and name == 'build' for module, name in ran)


@pytest.mark.parametrize('paper', PAPERS)
def test_every_commit_exists_and_what_is_lost_says_so(paper):
    names = set()
    for path in sorted((ROOT / 'papers' / paper / 'results').glob('*.csv')):
        for line in csv.DictReader(path.open(newline='')):
            names.add(line['commit'])
            assert line['code'] == 'lost' or re.fullmatch('[0-9a-f]{16}', line['code']), path
            assert line['code'] == 'lost' or not line['commit'].endswith('+'), path
            assert all(line[name] for name in ('processor', 'threads', 'torch')), path
    names |= {line.commit for line in read_ledger(paper)}
    for name in names - {'lost'}:
        git('cat-file', '-e', name.rstrip('+') + '^{commit}')


def versions(path: str) -> list[dict[tuple[str, ...], tuple[str, ...]]]:
    "The versions of a result file since its lines have had their present columns, the oldest first: (row, metric, seed) -> line."
    found = []
    for commit in git('log', '--format=%h', '--reverse', '--', path).split():
        text = git('show', f'{commit}:{path}') if git('ls-tree', commit, path) else ''
        if text.startswith('table,row,metric,scale,seed,value,unit,digest,code,'):
            found.append({(r[1], r[2], r[4]): tuple(r) for r in csv.reader(io.StringIO(text))})
    return [*found, {(r[1], r[2], r[4]): tuple(r) for r in csv.reader((ROOT / path).open(newline=''))}]


def test_result_lines_change_only_by_runs():
    "A line that is not what it was belongs to another execution: another unit or another time."
    edited = []
    for path in git('ls-files', 'papers/*/results/*.csv').split():
        history = versions(path)
        for then, now in zip(history, history[1:]):
            edited += [
                f'{path}: {key}'
                for key in then.keys() & now.keys()
                if then[key] != now[key] and then[key][10] == now[key][10]
            ]
    assert not edited


def test_ledgers_are_only_appended_to():
    for path in git('ls-files', 'papers/*/verified.csv').split():
        texts = [
            git('show', f'{commit}:{path}') for commit in git('log', '--format=%h', '--reverse', '--', path).split()
        ]
        texts.append((ROOT / path).read_text())
        assert all(now.startswith(then) for then, now in zip(texts, texts[1:])), path


def shown(path: Path) -> str:
    "All text among the outputs of a notebook."
    cells = json.loads(path.read_text())['cells']
    data = [
        out.get('data', {}) | {'text/plain': out.get('text', '')} for cell in cells for out in cell.get('outputs', ())
    ]
    return '\n'.join(''.join(text) for kinds in data for kind, text in kinds.items() if kind.startswith('text/'))


@pytest.mark.parametrize('paper', PAPERS)
def test_readme_and_chapters_mark_the_same_rows(paper):
    "Both were made when the same values were valid; where they differ, run the chapter or `make readme` again."
    doubted = {table for table in tables_of(paper) if stale(paper, read_results(paper, table, 'tiny'))}
    lines = [line for line in (ROOT / 'README.md').read_text().splitlines() if line.startswith(f'| {PAPERS[paper]} |')]
    marked = {line.split(' | ')[1] for line in lines if '†' in line}
    assert marked == {load_table(paper, table).table for table in doubted}
    chapters = [path for path in (ROOT / 'nbs' / 'papers').glob('*.ipynb') if f'{paper}.recipes' in path.read_text()]
    assert chapters and any('†' in shown(path) for path in chapters) == bool(doubted)
