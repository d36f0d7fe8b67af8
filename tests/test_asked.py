"""What the published columns ask of benchmarks: named and known, or the reason why not."""

from functools import partial
from types import SimpleNamespace

import pytest

from mllm_replica.core.recipe import Benchmark
from mllm_replica.core.registry import PAPERS, recipes_of, styles_of
from mllm_replica.running import publish
from mllm_replica.running.engine import Metric
from mllm_replica.scoring.asked import Asked, Question
from mllm_replica.scoring.styles import STYLES, lettered, style
from mllm_replica.scoring.tasks import TASKS, check_asked
from mllm_replica.tables.published import Column, Row, Table, load_table, tables_of
from mllm_replica.tables.reporting import comparison, recorded

COLUMNS = [
    (paper, table, column.key)
    for paper in PAPERS
    for table in tables_of(paper)
    for column in load_table(paper, table).columns
]
BENCHMARKS = (
    'mme mmbench mmbench_cn seed pope vqav2 okvqa gqa vizwiz textvqa scienceqa coco flickr30k nocaps textcaps mmmu '
    'mathvista ai2d chartqa docvqa infovqa ocrbench mmvet llava_wild qbench qbench2 mmhal mmvp realworldqa nlvr2 mantis '
    'blink mathverse_mv sciverse_mv mibench nextqa mvbench videomme longvideobench mlvu lvbench msrvtt_qa msvd_qa tgif_qa '
    'mmlu bbh agieval arc_challenge arc_easy'
)
DEV = dict(task='mmbench', split='dev', prompt='letter', metric='circular', factor=100, tolerance=0.5)


def column(paper, table, key):
    return load_table(paper, table).column(key)


def table(columns, rows=(), **more):
    head = dict(key='1', paper='owl2', table='1', arxiv='1', title='t', source='s', status='complete')
    return Table(**head, columns=columns, rows=list(rows), **more)


def test_every_column_names_its_task_or_the_reason_why_not():
    assert len(COLUMNS) == 410
    silent = [
        place for place in COLUMNS if sum(map(bool, ((c := column(*place)).task, c.unasked.strip(), c.mean_of))) != 1
    ]
    assert not silent


@pytest.mark.parametrize('paper', PAPERS)
def test_every_cell_asks_what_there_is(paper):
    asked = [
        found
        for t in map(partial(load_table, paper), tables_of(paper))
        for row in t.rows
        for c in t.columns
        if (found := t.asked(row.key, c.key))
    ]
    assert len(asked) > 10
    for found in asked:
        task = check_asked(found)
        assert found.metric in task.metrics and found.split in task.splits and '{' not in found.metric
        assert callable(style(found.prompt))


def test_a_printed_cell_could_come_from_its_metric():
    "What is printed, over the factor, lies in the range of the scorer's number."
    highest = dict(perception=2000, cognition=800, total=2800, cider=2)
    for paper, name, key in COLUMNS:
        t = load_table(paper, name)
        for row in t.rows:
            if (asked := t.asked(row.key, key)) is None or row.values[key] is None:
                continue
            most = highest.get(asked.metric, 200 if asked.task == 'mme' else 1)
            value = row.values[key] / asked.factor
            assert 0 <= value <= most and (value > 0.005 * most or value == 0), (paper, name, row.key, key)


@pytest.mark.parametrize(
    'place, asked',
    [
        (('honeybee', '6', 'mme'), ('mme', 'total', 1)),
        (('honeybee', '6', 'mme_p'), ('mme', 'perception', 1)),
        (('honeybee', '3', 'mme_pos'), ('mme', 'position', 1)),
        (('honeybee', '6', 'mmb'), ('mmbench', 'circular', 100)),
        (('honeybee', '6', 'seed_i'), ('seed', 'image', 100)),
        (('honeybee', '14c', 'fp_s'), ('mmbench', 'circular.finegrained_perception (instance-level)', 100)),
        (('owl2', '2', 'mme'), ('mme', 'perception', 1)),
        (('owl2', '2', 'seed'), ('seed', 'accuracy', 100)),
        (('mm1', '4', 'mme_c'), ('mme', 'cognition', 1)),
        (('eagle', '6_released', 'ocrbench'), ('ocrbench', 'accuracy', 1000)),
        (('eagle', '8_released', 'ocr'), ('ocrbench', 'accuracy', 100)),
        (('eagle', '6', 'seed'), ('seed', 'image', 100)),
        (('owl3', '7', 'gc'), ('mibench', 'circular.general_comparison', 100)),
    ],
)
def test_cells_that_were_not_met(place, asked):
    found = column(*place).task
    assert (found.task, found.metric, found.factor) == asked


def test_rows_that_are_splits_ask_for_their_own():
    pope = load_table('owl2', '9')
    found = {row.params['split']: pope.asked(row.key, 'yes').metric for row in pope.rows}
    assert found == {split: f'{split}.yes_ratio' for split in ('random', 'popular', 'adversarial')}
    assert pope.asked('random_owl2', 'f1').printed(0.8785) == pytest.approx(pope.cell('random_owl2', 'f1'))


@pytest.mark.parametrize('name', BENCHMARKS.split())
def test_every_benchmark_is_known(name):
    task = TASKS[name]
    assert task.metrics and task.splits and task.tokens > 0 and len(set(task.metrics)) == len(task.metrics)
    assert set(task.theirs) <= set(task.splits) and not set(task.splits) & set(task.served)
    for keys in task.theirs.values():
        assert set(keys) <= set(task.metrics)
        assert all(number.task and number.key.count(',') == 1 and number.unit in (1, 0.01) for number in keys.values())


def test_no_other_benchmarks():
    assert set(TASKS) == set(BENCHMARKS.split())


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(task='mmbnch'), "unknown benchmark 'mmbnch'; did you mean 'mmbench'"),
        (dict(metric='circularr'), "unknown metric of mmbench 'circularr'; did you mean 'circular'"),
        (dict(split='dav'), "unknown split of mmbench 'dav'; did you mean 'dev'"),
        (dict(split='test'), 'with a server; public: dev'),
        (dict(task='llava_wild', split='test', metric='score'), 'scored by GPT-4'),
        (dict(task='xyz'), 'known: mme, mmbench'),
    ],
)
def test_a_column_that_asks_what_there_is_not(change, message):
    with pytest.raises(ValueError, match=f'column score: .*{message}'):
        table(
            [Column(key='score', name='S', task=Asked(**DEV | change))], [Row(key='a', label='A', values={'score': 1})]
        )


def test_a_metric_of_the_row_needs_the_parameter():
    asked = Asked(**DEV | dict(task='pope', split='test', metric='{kind}.f1'))
    columns = [Column(key='score', name='S', task=asked)]
    rows = [Row(key=k, label=k, params=p, values={'score': 1}) for k, p in (('a', {'kind': 'random'}), ('b', {}))]
    assert table(columns, rows[:1]).asked('a', 'score').metric == 'random.f1'
    with pytest.raises(ValueError, match="asks for '{kind}.f1', row b has no 'kind'"):
        table(columns, rows)
    with pytest.raises(ValueError, match="unknown metric of pope 'rendom.f1'"):
        table(columns, [rows[0].model_copy(update={'params': {'kind': 'rendom'}})])


@pytest.mark.parametrize(
    'given', [dict(unasked='no'), dict(mean_of=['a']), dict(mean_of={'a': 0.5}, unasked='no', task=None)]
)
def test_a_column_has_one_origin(given):
    with pytest.raises(ValueError, match='expected one of them'):
        Column(**dict(key='x', name='x', task=Asked(**DEV)) | given)


def test_means_weigh_their_parts():
    t = load_table('honeybee', '3')
    row = t.row('cabs_144').values
    found = t.measured('paper').means({k: v for k, v in row.items() if k != 'avg_n'})
    assert found['avg_n'] == pytest.approx(row['avg_n'], abs=0.06)
    assert t.measured('paper').means({'mme_pos': 1.0}) == {}
    assert t.tolerance('avg_n') == pytest.approx((5 * 0.5 + 2.5 + 1.5 + 4.5 + 1.5 + 1.5) / 6)
    assert t.tolerance('s_per_step') is None and t.tolerance('mme_pos') == 5
    assert load_table('eagle', '8_released').tolerance('know_avg') is None  # MathVista has a judge


@pytest.mark.parametrize('paper', PAPERS)
def test_printed_means_follow_from_their_parts(paper):
    for name in tables_of(paper):
        t = load_table(paper, name)
        for row in t.rows:
            values = {k: v for k, v in row.values.items() if isinstance(v, (int, float))}
            for key, mean in t.measured('paper').means(values).items():
                if key in values:
                    assert mean == pytest.approx(values[key], abs=0.15), (name, row.key, key)


@pytest.mark.parametrize('parts', [['nothing'], ['mean'], {'other': 1.0}])
def test_a_mean_of_what_is_no_measurement(parts):
    columns = [
        Column(key='score', name='S'),
        Column(key='mean', name='M', mean_of=parts),
        Column(key='other', name='O', mean_of=['score']),
    ]
    with pytest.raises(ValueError, match='column mean is the mean of'):
        table(columns)


def test_questions_of_a_training_unit_meet_no_cell():
    recipe = recipes_of('honeybee').recipe('6', 'honeybee_c_7b', 'paper', 42)
    share = dict.fromkeys([b.name for b in recipe.benchmarks], 0.7) | {'seconds': 1.0}
    kept = recorded(recipe, share)
    for name in tables_of('honeybee'):
        t = load_table('honeybee', name)
        assert not set(kept) & {c.key for c in t.columns}
        logged = comparison('honeybee', name, t.rows[-1].key, 'paper', kept)
        assert not any(key.startswith('difference/') for key in logged)
    assert kept['questions.mme'] == 0.7 and kept['seconds'] == 1.0
    tiny = recipes_of('honeybee').recipe('3', 'cabs_144', 'tiny', 10)
    own = {tiny.benchmarks[0].name: 0.5}
    assert recorded(tiny, own) == own and isinstance(tiny.benchmarks[0], Benchmark)


def test_records_of_a_training_unit_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, 'code_of', lambda recipe: 'code')
    (tmp_path / 'result.json').touch()
    (tmp_path / 'commit').write_text('abc')
    recipe = recipes_of('honeybee').recipe('16', 'c_7b_144', 'paper', 42)
    metrics = {'pope': Metric(value=0.8, n=3), 'gflop': Metric(value=2.0)}
    result = SimpleNamespace(metrics=metrics, digest='d', seconds=1.0, processor='p', threads=1, versions={})
    order = SimpleNamespace(result=lambda: result, folder=tmp_path, unit_key='unit')
    found = publish._records(recipe, order, own=True)
    assert {r.metric: (r.value, r.n_eval) for r in found} == {'questions.pope': (0.8, 3), 'gflop': (2.0, None)}


def test_a_difference_is_in_printed_units():
    asked = column('honeybee', '6', 'mmb').task
    logged = comparison('honeybee', '6', 'honeybee_c_7b', 'paper', {'mmb': asked.printed(0.711), 'mme': 1880.0})
    assert logged['difference/mmb'] == pytest.approx(71.1 - 70.1)
    assert logged['difference/mme'] == pytest.approx(1880.0 - load_table('honeybee', '6').cell('honeybee_c_7b', 'mme'))


# ------------------------------------------------------------------------------------------------------------------ styles
SKY = Question(id='1', text='Which colour is it?', options=['red', 'blue'], hint='Look up.', ocr=['SKY', '7'])
CAT = Question(id='2', text='Is this a cat? Please answer yes or no.')
ALL_STYLES = [*STYLES, *(f'{paper}.{name}' for paper in PAPERS for name in styles_of(paper))]


@pytest.mark.parametrize('name', ALL_STYLES)
def test_a_style_keeps_the_question(name):
    text = style(name)(SKY)
    if name.split('.')[-1] != 'caption':
        assert SKY.text in text or SKY.text.lower() in text.lower()
    marks = {'owl3.nlvr2': 2}.get(name, 0)
    assert text.count('<image>') == marks and 'None' not in text
    assert not text.endswith(('\n', ' ')) or name.startswith('honeybee.')


@pytest.mark.parametrize(
    'name', [n for n in ALL_STYLES if n.split('.')[-1] in ('letter', 'mmb', 'mmbench', 'choice', 'mmmu')]
)
def test_a_style_with_options_lists_them_all(name):
    many = SKY.model_copy(update={'options': ['red', 'blue', 'green', 'grey', '{x}']})
    text = style(name)(many)
    assert all(line in text for line in ('A. red', 'B. blue', 'C. green', 'D. grey', 'E. {x}'))


@pytest.mark.parametrize(
    'name, question, text',
    [
        ('word', SKY, 'Look up.\nWhich colour is it?\nAnswer the question using a single word or phrase.'),
        ('word', CAT, 'Is this a cat?\nAnswer the question using a single word or phrase.'),
        ('bare', CAT, CAT.text),
        ('bare', SKY, 'Look up.\nWhich colour is it?\nA. red\nB. blue'),
        ('yes_no', CAT, 'Is this a cat?\nPlease answer yes or no.'),
        (
            'letter',
            SKY,
            "Look up.\nWhich colour is it?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly.",
        ),
        ('letter', CAT, 'Is this a cat?\nAnswer the question using a single word or phrase.'),
        ('honeybee.mme', CAT, 'Answer the question using a single word or phrase. ' + CAT.text),
        (
            'honeybee.mmb',
            SKY,
            "Answer with the option's letter from the given choices directly. Which colour is it?\nContext: Look up.\n"
            'There are several options:\nA. red\nB. blue\nC. N/A\nD. N/A\nE. N/A\n',
        ),
        (
            'honeybee.eval-sqa',
            SKY.model_copy(update={'hint': ''}),
            "Answer with the option's letter from the given choices directly. Which colour is it?\nContext: N/A\n"
            'There are several options:\nA. red\nB. blue\n',
        ),
        ('owl2.caption', CAT, 'Provide a one-sentence caption for the provided image.'),
        ('owl2.vqa', SKY, 'Which colour is it? Answer the question using a single word or phrase.'),
        ('owl2.mme', CAT, 'Is this a cat?\nAnswer the question using a single word or phrase.'),
        (
            'owl2.mmbench',
            SKY.model_copy(update={'hint': ''}),
            'N/A\nWhich colour is it?\nA. red\nB. blue\nAnswer with the option’s letter from the given choices directly.',
        ),
        (
            'owl3.mmbench',
            SKY,
            'Context: Look up.\nQuestion: Which colour is it?\nOptions: A. red\nB. blue\n'
            'Answer with the option’s letter from the given choices directly.',
        ),
        (
            'owl3.video',
            SKY,
            '\nQuestion: Which colour is it?\nOptions: A. red\nB. blue\n'
            'Answer with the option’s letter from the given choices directly.',
        ),
        (
            'owl3.nlvr2',
            CAT,
            f'Left image: <image> Right image: <image>\n{CAT.text}\nyes or no? Answer the question using a single word.',
        ),
        (
            'eagle.mmbench',
            SKY,
            'Look up. Which colour is it? There are several options:\nA. red\nB. blue\n\n'
            "Answer with the option's letter from the given choices directly.",
        ),
        ('eagle.chartqa', CAT, CAT.text + '\nAnswer the question with a single word.'),
        (
            'eagle.textvqa',
            SKY.model_copy(update={'text': 'what is Written?', 'hint': ''}),
            'What is written?\nReference OCR token: SKY, 7\nAnswer the question using a single word or phrase.',
        ),
    ],
)
def test_wordings_are_exact(name, question, text):
    assert style(name)(question) == text


def test_pictures_are_tagged_in_their_places():
    two = SKY.model_copy(update={'images': [{'path': 'a'}, {'path': 'b'}]})
    assert style('owl3.numbered')(two).startswith('Image 1: <image>\nImage 2: <image>\nQuestion: ')
    assert style('owl3.tagged')(two).startswith('Image 1: <image> Image 2: <image> Which colour')
    placed = Question(id='3', text='<image>and then <image>?', images=two.images)
    assert style('owl3.tagged')(placed) == 'Image 1: <image> and then Image 2: <image> ?'


@pytest.mark.parametrize(
    'name, message',
    [
        ('lettr', "unknown prompt style 'lettr'; did you mean 'letter'"),
        ('honeybee.mmbb', "unknown prompt style of honeybee 'mmbb'; did you mean 'mmb'"),
        ('eagel.mmmu', "unknown paper 'eagel'; did you mean 'eagle'"),
        ('mm1.word', 'unknown prompt style of mm1'),
    ],
)
def test_an_unknown_style_says_what_is_close(name, message):
    with pytest.raises(ValueError, match=message):
        style(name)


def test_letters_follow_the_options():
    assert lettered(SKY) == 'A. red\nB. blue' and lettered(CAT) == ''
