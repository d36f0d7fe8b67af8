"""The official scorers give the recorded official results, and keep their quirks on random answers."""

import json, random
from pathlib import Path

import pytest

from mllm_replica.scoring import official_scorers as b

GOLDEN = json.loads((Path(__file__).parent / 'golden' / 'honeybee' / 'scorers.json').read_text())


def test_mme():
    expected = GOLDEN['mme']['output']
    found = b.mme(GOLDEN['mme']['input'])
    for half in ('Perception', 'Cognition'):
        assert list(found[half]) == list(expected[half])
        for task, numbers in expected[half].items():
            assert found[half][task] == pytest.approx(numbers, abs=1e-9), task
    assert found['Total'] == pytest.approx(expected['Total'], abs=1e-9)


def test_pope():
    case = GOLDEN['pope']
    assert b.pope(case['preds'], case['labels']) == pytest.approx(case['output'], abs=1e-15)


def test_seed():
    found = b.seed(GOLDEN['seed']['input'])
    assert found == GOLDEN['seed']['output'] and list(found) == list(GOLDEN['seed']['output'])


def test_mmbench():
    assert b.mmbench(GOLDEN['mmb']['input']) == GOLDEN['mmb']['output']


def test_scienceqa():
    case = GOLDEN['sqa_score']
    assert b.scienceqa(case['problems'], case['preds']) == case['output']


@pytest.mark.parametrize('case', GOLDEN['infer'], ids=lambda c: c['answer'])
def test_infer(case):
    assert (b.infer(case['answer'], case['choices']) or False) == case['result']


@pytest.mark.parametrize('case', GOLDEN['mmmu_open'], ids=lambda c: c['response'])
def test_mmmu_open(case):
    parsed = b.mmmu_parse(case['response'])
    assert set(parsed) == set(case['parsed']) and len(parsed) == len(case['parsed'])
    assert b.mmmu_open(case['gold'], parsed) == case['correct']


def test_the_mmbench_draw_depends_on_the_order_of_questions_only():
    "Unreadable answers use one random stream, seeded once: the same results give the same score, whatever was drawn before."
    unreadable = [row | {'pred': '?'} for row in GOLDEN['mmb']['input']]
    random.seed(1)
    first = b.mmbench(unreadable)
    random.seed(2)
    second = b.mmbench(unreadable)
    assert first == second and first['total_corrects'] < first['total_samples']


def test_scores_do_not_depend_on_the_order_of_rows():
    rows = GOLDEN['seed']['input'][:]
    random.Random(0).shuffle(rows)
    assert b.seed(rows) == b.seed(GOLDEN['seed']['input'])


def test_scienceqa_reads_the_last_option_and_draws_the_rest():
    problems = {str(i): dict(choices=['north', 'south', 'east'], answer=2) for i in range(300)}

    def says(text):
        return b.scienceqa(problems, [dict(question_id=k, pred=text, image_path=None) for k in problems])['acc']

    assert says('north, then east.') == 100 and says('(C).') == 100 and says('A') == 0
    assert 20 < says('nothing of that') < 47 and 20 < says('E') < 47  # E is no option here


def test_mmmu_numbers():
    assert b.mmmu_parse('The total is 1,234 or -2e3 or .5')[:3] == ['1,234 or -2e3 or .5', 1234.0, -2000.0]
    assert b.mmmu_open('3.14159', b.mmmu_parse('pi is 3.14'))
    assert not b.mmmu_open('3.2', b.mmmu_parse('pi is 3.14'))


def test_mmmu_tails():
    assert b.mmmu_parse('so it is \nthe answer is 7') == [7.0]  # an empty tail hides its line
    assert b.mmmu_parse('x = 3\ny = 4') == [4.0]  # '=' counts in the last line only
    assert b.mmmu_parse('Red. Blue is right') == ['right']  # after lower-casing no full stop ends a sentence


# files that are not whole, labels that say something else


@pytest.mark.parametrize('label', ['No', 'NO', 'no ', ' no\n'])
def test_a_no_is_a_no_however_it_is_written(label):
    assert b.pope(['no', 'yes'], [label, 'Yes'])['accuracy'] == pytest.approx(1)


@pytest.mark.parametrize('label', [0, 1, False, None, 'maybe', '', 'n', ['no']])
def test_other_labels_are_refused_by_name(label):
    with pytest.raises(ValueError, match='label 1 is .*must be .yes. or .no.'):
        b.pope(['no', 'no'], ['no', label])
    with pytest.raises(ValueError, match='the answer of x is'):
        b.mme_task(['x\tq1\tyes\tyes', f'x\tq2\t{label}\tyes'])


def question(number, options=4, category='c'):
    texts = {letter: f'option {letter}' for letter in 'ABCD'[:options]}
    rest = dict.fromkeys('ABCD'[options:], 'N/A')
    return [
        dict(
            index=number + turn * 10**6,
            category=category,
            l2_category='l',
            options_dict=texts | rest,
            answer=right,
            pred=right,
        )
        for turn, right in enumerate(texts)
    ]


def test_circular_evaluation_needs_every_rotation_once():
    whole = question(7) + question(8, options=2)
    assert b.mmbench(whole)['total_acc'] == '100.00'
    for wrong, message in [
        (whole[:1], '3 missing: 1000007, 2000007, 3000007'),
        (whole[:1] * 4, '3 missing.*1 doubled: 7'),
        (whole[:5], '1 missing: 1000008'),
        (whole + whole[-1:], '1 doubled: 1000008'),
        (
            [row | dict(index=7 + i * 10**6, answer='A') for i, row in enumerate(question(7))],
            'right letter does not move',
        ),
        ([], 'no predictions'),
    ]:
        with pytest.raises(ValueError, match=message):
            b.mmbench(wrong)


def test_scienceqa_needs_every_problem_once():
    problems = {key: dict(choices=['x', 'y'], answer=0) for key in ('1', '2')}
    row = dict(question_id='1', pred='A', image_path=None)
    for given, message in [
        ([row], "1 missing: '2'"),
        ([row, row | dict(question_id='2'), row], "1 doubled: '1'"),
        ([row, row | dict(question_id='2'), row | dict(question_id='3')], "1 unknown: '3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            b.scienceqa(problems, given)


def test_mme_needs_both_lines_of_an_image_beside_each_other():
    lines = [f'{image}\tq{i}\t{label}\tyes' for image in 'ab' for i, label in enumerate(('yes', 'no'))]
    assert b.mme_task(lines) == (50, 50, 0)
    for wrong, message in [
        ([lines[i] for i in (0, 2, 1, 3)], 'pairs of a and b'),
        ([lines[0], lines[2], lines[3], lines[1]], 'pairs of a and b, b and a'),
        (lines[:2] * 2, 'doubled'),
        ([lines[0]] * 2, 'doubled'),
        (lines[:3], 'b has 1'),
        ([], 'no lines'),
    ]:
        with pytest.raises(ValueError, match=message):
            b.mme_task(wrong)


def test_doubled_and_missing_records_of_the_others():
    row = dict(pred='A', answer='A', question_type='t', question_type_id=1, question_id='q')
    with pytest.raises(ValueError, match="SEED: 1 doubled: 'q'"):
        b.seed([row, row])
    choice = dict(question_type='multiple-choice', answer='B', pred='B', all_choices=['A', 'B'], num_option_images=0)
    with pytest.raises(ValueError, match="MMMU: 1 doubled: 'q'"):
        b.mmmu([choice | dict(id='q')] * 2)
    for empty in (lambda: b.seed([]), lambda: b.mmmu([]), lambda: b.pope([], [])):
        with pytest.raises(ValueError, match='no predictions'):
            empty()
