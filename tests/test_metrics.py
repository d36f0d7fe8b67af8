"""Metrics on random answers: bounds and symmetries; the bootstrap interval covers as often as it says."""

import random

import numpy as np
import pytest

from mllm_replica.core.metrics import METRICS, bootstrap, letter, metric, token_f1, vqa_accuracy, yes_no
from mllm_replica.core.registry import PAPERS, recipes_of
from mllm_replica.data.worlds.making import samples
from mllm_replica.tables.published import tables_of

WORDS = 'red blue yes no a b dog 7 ? .'.split()


@pytest.mark.parametrize('name', METRICS)
def test_bounds_and_the_answer_itself(name):
    rng, answers = (
        random.Random(0),
        {'yes_no': ['yes', 'no'], 'letter': ['A', 'b']}.get(name, ['red dog', 'b 7', 'yes']),
    )
    assert metric(name).__doc__.partition('\n')[0].endswith('.')
    for answer in answers:
        assert metric(name)(f'  {answer.upper()} ', answer) == 1
        for _ in range(100):
            assert 0 <= metric(name)(' '.join(rng.choices(WORDS, k=rng.randrange(5))), answer) <= 1


def test_token_f1_is_symmetric():
    rng = random.Random(1)
    for _ in range(100):
        a, b = (' '.join(rng.choices(WORDS, k=rng.randrange(6))) for _ in range(2))
        assert token_f1(a, b) == token_f1(b, a)


def test_vqa_accuracy_equals_its_definition():
    rng = random.Random(2)
    for _ in range(50):
        people = rng.choices(['red', 'blue', 'green'], k=10)
        subsets = [people[:i] + people[i + 1 :] for i in range(10)]
        assert vqa_accuracy('red', people) == pytest.approx(np.mean([min(1, s.count('red') / 3) for s in subsets]))


def test_one_person_and_one_text_are_the_same():
    assert vqa_accuracy('red', ['red']) == vqa_accuracy('red', 'red') == 1


def test_yes_no_takes_whole_words():
    assert yes_no('Nobody knows', 'no') == 0 and yes_no('eyes: yes', 'yes') == 1


def test_bootstrap_covers_the_true_mean():
    "Over 200 data sets of 50 coin tosses the 95 % interval holds the true mean in 90 to 98 % of the cases."
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = bootstrap(rng.random(50) < 0.7, n=300, seed=i)
        inside += low <= 0.7 <= high
    assert 180 <= inside <= 196


def test_clusters_of_one_change_nothing_and_big_clusters_widen():
    values = (np.random.default_rng(3).random(120) < 0.5).astype(float)
    assert bootstrap(values, clusters=range(120)) == bootstrap(values)
    same = np.repeat([0.0, 1.0], 60)
    assert np.diff(bootstrap(same, clusters=[i // 20 for i in range(120)])) > 2 * np.diff(bootstrap(same))


# what the benchmarks count as right


@pytest.mark.parametrize(
    'said, told',
    [
        ('Black.', 'black'),
        ('two', '2'),
        ('None', '0'),
        ('a dog', 'dog'),
        ('dont know', "don't know"),
        ('don’t know', "don't know"),
        ("couldnt've", "couldn't've"),
        ('10 %', '10%'),
        ('$ 5', '$5'),
        ('red, white', 'red white'),
        ('red,white', 'red white'),
        ('red/white', 'red white'),
        ('1,000', '1000'),
        ('U.S.', 'us'),
        ('"Yes!"', 'yes'),
        ('an\napple\t', 'Apple'),
        ('the', 'The'),
    ],
)
def test_vqa_answers_are_compared_after_the_official_normalisation(said, told):
    assert vqa_accuracy(said, [told] * 10) == vqa_accuracy(told, [said] * 10) == vqa_accuracy(said, told) == 1


@pytest.mark.parametrize('said, told', [('3.5', '35'), ('red', 'red white'), ('ten', '1'), ('its', "it's"), ('a', '')])
def test_the_normalisation_keeps_what_differs(said, told):
    assert vqa_accuracy(said, [told] * 10) == 0


@pytest.mark.parametrize('people', range(1, 11))
def test_people_who_agree_are_right_however_few(people):
    assert vqa_accuracy('red', ['red'] * people) == 1 and vqa_accuracy('blue', ['red'] * people) == 0


def test_few_people_who_disagree():
    found = [vqa_accuracy('red', answers.split()) for answers in ('red blue', 'red red blue', 'red blue blue blue')]
    assert found == pytest.approx([1 / 2, 2 / 3, 1 / 4])


STATED = [
    'B',
    'b.',
    '(B)',
    '[B]',
    'B) a dog',
    'B: a dog',
    'B.dog',
    'B - a dog',
    'B – a dog',
    'B\nbecause it barks',
    'B because it barks',
    'B is correct',
    '**B**',
    '**B.** a dog',
    '`B`',
    'Answer: B',
    '**Answer:** B',
    'answer is b',
    'The correct answer is B. Here is why',
    'The correct option is (B), a dog',
    'It barks, so the answer is: B',
    'The answer is option B.',
    r'The final answer is $\boxed{B}$.',
    '（B）',
]


@pytest.mark.parametrize('text', STATED)
def test_a_stated_letter_counts_with_its_explanation(text):
    assert letter(text, 'B') == letter(text, 'b') == 1 and letter(text, 'A') == 0


@pytest.mark.parametrize(
    'text, answer',
    [
        ('I.e. nothing', 'I'),
        ('I think it is a dog', 'I'),
        ("I'd say so", 'I'),
        ('A dog', 'A'),
        ('The answer is a dog', 'A'),
        ('A.M.', 'A'),
        ('E.g. a dog', 'E'),
        ('T-shirt', 'T'),
        ('Because', 'B'),
        ('The answer is not B', 'B'),
        ('B. a dog? No, the answer is C.', 'B'),
        ('none', 'N'),
    ],
)
def test_no_letter_is_guessed(text, answer):
    assert letter(text, answer) == 0


@pytest.mark.parametrize(
    'said, told, score',
    [
        ('ab', 'ab', 1),
        ('AB  c ', 'ab c', 1),
        ('abcd', 'abce', 0.75),
        ('abxy', 'abcd', 0),  # exactly one half
        ('abc', 'abcdefg', 0),
        ('abcdx', 'abcdefg', 4 / 7),
        ('', 'a', 0),
        ('12 mai', ['may 12', '12 may'], 5 / 6),
    ],
)
def test_anls(said, told, score):
    assert metric('anls')(said, told) == pytest.approx(score)


@pytest.mark.parametrize('name', METRICS)
def test_every_metric_takes_several_answers(name):
    right, other = {'yes_no': ('yes', 'no'), 'letter': ('B', 'A')}.get(name, ('crimson', 'red'))
    score = metric(name)
    assert score(right, [other, right, right, right, right]) == 1
    assert score(right, [dict(answer=right, answer_confidence='yes', answer_id=i) for i in range(3)]) == 1
    for wrong in ([], None, 3, [right, 3], [[right]], [dict(text=right)]):
        with pytest.raises(ValueError, match='expected a text, a list of texts'):
            score(right, wrong)


# what published numbers of the small worlds stand on

TINY = {'exact_match', 'token_f1', 'word_accuracy'}


def test_tiny_results_use_metrics_that_one_answer_leaves_as_they_were():
    "Their samples have one answer each, and of one answer the best is that one."
    used = {
        benchmark.metric
        for paper in PAPERS
        for table in tables_of(paper)
        for row, reason in recipes_of(paper).rows(table, 'tiny').items()
        if reason is None
        for benchmark in recipes_of(paper).recipe(table, row, 'tiny', 10).benchmarks
    }
    assert used <= TINY
    texts = [sample['answer'] for sample in samples('pages', 'test', 10, 20, tasks=['document'])]
    for name in TINY:
        score, before = metric(name), metric(name).__wrapped__
        assert [score(p, a) for p in texts for a in texts] == [before(p, a) for p in texts for a in texts]
