"""MM1's few-shot prompts and scores: worked numbers, what decides a prompt, mixed resolution, images that are missing."""

import json
import random
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mllm_replica.core.metrics import vqa_accuracy
from mllm_replica.data.images import encode_png
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.samples import COLUMNS, IMAGE_MARK, check_sample
from mllm_replica.mm1.shots import CAPTION, VQA, Template, demonstrations, few_shot, resolutions
from mllm_replica.models.image_processing import VisionLanguageImageProcessor
from mllm_replica.models.vlm import VisionLanguageProcessor
from mllm_replica.scoring.captions import caption_words, cider_d

GOLDEN = Path(__file__).parent / 'golden' / 'mm1'
METRICS = yaml.safe_load((GOLDEN / 'metrics.yaml').read_text())
MIXED = yaml.safe_load((GOLDEN / 'high_resolution.yaml').read_text())['mixed_resolution_few_shot']


def asked(id, color, question='what color is it ?', **more):
    turns = [{'from': 'human', 'value': f'{IMAGE_MARK}\n{question}'}, {'from': 'gpt', 'value': color}]
    content = (
        id,
        [dict(bytes=encode_png(Image.new('RGB', (8, 8), color)), path=f'{id}.png')],
        turns,
        '',
        'color',
        color,
        ['red', color],
        '{"scene": 1}',
    )
    return dict(zip(COLUMNS, content)) | more


def captioned(id, color):
    return asked(id, color, conversations=[], document=f'{IMAGE_MARK} a {color} ground', options=[], answer='')


def text_of(sample):
    return sample['conversations'][0]['value']


def shots_of(sample):
    return json.loads(sample['meta'])['shots']


@pytest.fixture(scope='module')
def pool():
    return [asked(f'train-{i}', f'#{i:02x}8040', f'question {i} ?') for i in range(40)]


QUERY = asked('test-0', 'red', 'which ?')


# scores


@pytest.mark.parametrize('case', METRICS['vqa_accuracy'], ids=lambda case: case['prediction'])
def test_worked_vqa_accuracy(case):
    assert vqa_accuracy(case['prediction'], case['answers']) == pytest.approx(case['accuracy'], abs=1e-12)


def test_worked_cider():
    golden = METRICS['cider']
    scores = cider_d(golden['hypotheses'], golden['references'])
    assert scores == pytest.approx(golden['per_image'], rel=1e-6)
    assert sum(scores) / len(scores) == pytest.approx(golden['corpus'], rel=1e-6)
    assert 100 * sum(scores) / len(scores) == pytest.approx(golden['as_reported_in_papers'], rel=1e-6)


def test_cider_properties():
    rng = random.Random(0)
    texts = [' '.join(rng.choices('abcdefgh', k=9)) for _ in range(12)]
    references = [texts[3 * i : 3 * i + 3] for i in range(4)]
    guesses = [' '.join(rng.choices('abcdefgh', k=9)) for _ in range(4)]
    scores = cider_d(guesses, references)
    assert all(0 <= score <= 10 for score in scores)
    assert cider_d(guesses[::-1], references[::-1]) == pytest.approx(scores[::-1])
    assert cider_d(guesses, [texts[::-1] for texts in references]) == pytest.approx(scores)
    same = [[text] for text in texts]
    assert cider_d(texts, same) == pytest.approx([10] * 12)
    longer = cider_d([f'{texts[0]} {texts[0]}', *texts[1:]], same)
    assert longer[0] < 10 * 2.718281828 ** (-(9**2) / 72) and longer[1:] == pytest.approx(
        [10] * 11
    )  # nine words too many, sigma 6
    assert cider_d(['a a', 'b'], [['a'], ['b']])[0] == pytest.approx(
        10 * 2.718281828459045 ** (-1 / 72) / 8
    )  # a word said twice is half right
    assert cider_d(['', 'zz'], [['a b'], ['c d']]) == [0, 0]
    assert cider_d(['the cat', 'dog'], [['the cat'], ['the dog']])[0] == pytest.approx(
        5
    )  # no 3- or 4-grams on either side


@pytest.mark.parametrize(
    'predictions, references, message',
    [
        (['a'], [['a']], 'at least two images'),
        (['a'], [['a'], ['b']], '1 captions for 2 images'),
        (['a', 'b'], [['a'], []], 'image 1 has \\[\\] as references'),
        (['a', 'b'], [['a'], 'b'], "image 1 has 'b' as references"),
    ],
)
def test_captions_that_cannot_be_scored(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        cider_d(predictions, references)


# prompts


@pytest.mark.parametrize('shots', [0, 1, 4, 8])
def test_a_prompt_is_its_demonstrations_and_the_query(pool, shots):
    made, by_id = few_shot(QUERY, pool, shots, 5), {row['id']: row for row in pool}
    check_sample(made)
    drawn = [by_id[name] for name in shots_of(made)]
    assert len({row['id'] for row in drawn}) == len(drawn) == shots
    lines = [
        f'<image> Question: {text_of(row).split(IMAGE_MARK)[1].strip()} Short answer: {row["answer"]}' for row in drawn
    ]
    assert text_of(made) == '\n'.join([*lines, '<image> Question: which ? Short answer:'])
    assert made['images'] == [row['images'][0] for row in [*drawn, QUERY]]
    assert [made[key] for key in ('id', 'task', 'answer', 'options')] == [
        QUERY[key] for key in ('id', 'task', 'answer', 'options')
    ]
    assert made['conversations'][1]['value'] == 'red' and json.loads(made['meta'])['scene'] == 1


def test_captions_are_asked_for_without_a_question():
    made = few_shot(captioned('test', 'red'), [captioned('a', 'blue')], 1, 0, CAPTION)
    assert text_of(made) == '<image> A photo of a blue ground\n<image> A photo of' and made['answer'] == 'a red ground'
    assert few_shot(captioned('test', 'red'), [], 0, 0, CAPTION)['images'] == captioned('test', 'red')['images']


def test_only_seed_and_query_decide(pool):
    prompts = {shots: few_shot(QUERY, pool, shots, 1) for shots in (4, 8)}
    assert few_shot(QUERY, pool, 8, 1) == prompts[8] and shots_of(prompts[8])[:4] == shots_of(prompts[4])
    draws = {
        tuple(shots_of(few_shot(QUERY | dict(id=f'test-{i}'), pool, 4, seed))) for i in range(10) for seed in range(10)
    }
    assert len(draws) > 95
    counts = [sum(row['id'] in draw for draw in draws) for row in pool]
    assert min(counts) > 0 and max(counts) < 30  # 10 expected each


def test_the_query_and_its_picture_are_never_shown(pool):
    other = QUERY | dict(id='train-x')
    for seed in range(20):
        assert {row['id'] for row in demonstrations(QUERY, [*pool[:3], QUERY, other], 3, seed)} == {
            row['id'] for row in pool[:3]
        }
    with pytest.raises(ValueError, match="'test-0': 4 demonstrations were asked for, the pool has 3 for it"):
        few_shot(QUERY, [*pool[:3], QUERY, other], 4, 0)


def test_text_can_be_asked_with_shots_too():
    words = [asked(f't{i}', color, f'is {color} ?', images=[]) for i, color in enumerate(['red', 'blue', 'green'])]
    made = few_shot(words[0], words, 2, 0, Template('{question}', ' . '))
    assert sorted(shots_of(made)) == ['t1', 't2'] and made['images'] == []
    assert text_of(made) in (
        'is blue ? blue . is green ? green . is red ?',
        'is green ? green . is blue ? blue . is red ?',
    )
    with pytest.raises(ValueError, match='the pool has 2 for it'):
        few_shot(words[0], words, 3, 0, Template('{question}', ' . '))


@pytest.mark.parametrize(
    'images, message',
    [
        ([], "sample 'train-0' has 0 images, the template shows 1"),
        ([None], "sample 'train-0': an image is missing"),
        ([dict(bytes=None, path=None)], "sample 'train-0': an image is missing"),
        ([dict(bytes=None, path='no/such.png')], "sample 'train-0': an image is missing"),
    ],
)
def test_a_shot_without_its_image_is_an_error(pool, images, message):
    with pytest.raises(ValueError, match=message):
        few_shot(QUERY, [pool[0] | dict(images=images)], 1, 0)
    with pytest.raises(ValueError, match=message):
        few_shot(pool[0] | dict(images=images), pool[1:], 1, 0)


def test_a_conversation_is_no_shot(pool):
    long = pool[0] | dict(conversations=pool[0]['conversations'] * 2)
    with pytest.raises(ValueError, match="'train-0' has 4 turns; a shot is one question"):
        few_shot(QUERY, [long], 1, 0)


@pytest.mark.parametrize(
    'bare',
    [
        dict(document='<image> '),
        dict(conversations=[{'from': 'human', 'value': '<image> q'}, {'from': 'gpt', 'value': ' '}]),
    ],
)
def test_a_shot_without_an_answer(pool, bare):
    with pytest.raises(ValueError, match="'train-0' has no caption or answer to show"):
        few_shot(QUERY, [pool[0] | bare], 1, 0)


def test_fewer_than_no_shots(pool):
    with pytest.raises(ValueError, match='-1 demonstrations were asked for; expected 0 or more'):
        few_shot(QUERY, pool, -1, 0)


@pytest.mark.parametrize(
    'template, text, answer',
    [
        (VQA, ' two dogs\n<image> Question: what', 'two dogs'),
        (VQA, '\n red ', 'red'),
        (CAPTION, 'a cat', 'a cat'),
        (VQA, '', ''),
        (Template('<image>', ' . '), 'red . <image>', 'red'),
        (Template('<image>', ' . '), 'red .', 'red'),
        (Template('<image>', ' '), 'red hat', 'red hat'),
    ],
)
def test_an_answer_ends_where_the_next_demonstration_would_begin(template, text, answer):
    assert template.cut(text) == answer


# mixed resolution


@pytest.mark.parametrize('case', MIXED['cases'], ids=lambda case: f'{case["shots"]}-{case["high_res_demos"]}')
def test_worked_budgets_of_mixed_resolution(pool, case):
    low, high, shots = MIXED['k_low'], MIXED['k_high'], case['shots']
    crops = resolutions(shots, case['high_res_demos'])
    assert crops == [False] * case['low_res_demos'] + [True] * (case['high_res_demos'] + 1)  # the query is high
    for count, name in ((case['high_res_demos'], 'visual_tokens'), (shots, 'all_high')):
        assert sum(high if kept else low for kept in resolutions(shots, count)) == case[name]
        made = few_shot(QUERY, pool, shots, 0, views=lambda image: [image] * 5, high=count)
        assert low * len(made['images']) == case[name]
    assert low * len(few_shot(QUERY, pool, shots, 0)['images']) == case['all_low']


def test_the_last_demonstrations_keep_their_crops(pool):
    made = few_shot(QUERY, pool, 3, 0, views=lambda image: [image, dict(image, path='crop')], high=1)
    assert [line.count(IMAGE_MARK) for line in text_of(made).split('\n')] == [1, 1, 2, 2]
    assert [image['path'] == 'crop' for image in made['images']] == [False, False, False, True, False, True]
    assert shots_of(made) == shots_of(few_shot(QUERY, pool, 3, 0))
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f'{wrong} of 3 demonstrations cannot keep their crops; expected 0 to 3'):
            few_shot(QUERY, pool, 3, 0, high=wrong)


def test_a_prompt_can_be_encoded(pool):
    processor = VisionLanguageProcessor(VisionLanguageImageProcessor(8), byte_tokenizer(), visual_tokens=4)
    encoded = processor.encode(few_shot(QUERY, pool, 4, 0), training=False)
    assert len(encoded.images) == len(encoded.image_spans) == 5 and processor.decode(encoded.input_ids).endswith(
        'which ? Short answer:'
    )


# words of captions


def test_captions_are_cut_into_words_before_they_are_scored():
    plain = ['a red car on the road', "it 's a dog", 'two cats']
    written = ['A red car on the road.', '"It\'s a dog!"', 'Two cats ...']
    references = [[text] for text in plain]
    assert cider_d(written, references) == pytest.approx(cider_d(plain, references))
    assert cider_d(plain, [[text] for text in written]) == pytest.approx(cider_d(plain, references))


@pytest.mark.parametrize(
    'caption, words',
    [
        ("They can't; we'll wait -- gonna!", "they ca n't we 'll wait gon na"),
        ('Mr. Lee at 10:30, in the U.S., with 1,000 cats', 'mr. lee at 10:30 in the u.s. with 1,000 cats'),
        ('A well-known black/white cat', 'a well-known black/white cat'),
        ('“Curly” ‘quotes’, don’t', "curly quotes do n't"),
        ('A dog (brown)', 'a dog -lrb- brown -rrb-'),
        ('100% of it', '100 % of it'),
        ('', ''),
    ],
)
def test_words_are_those_of_the_treebank_without_punctuation(caption, words):
    assert ' '.join(caption_words(caption)) == words


def test_the_small_world_counts_blank_separated_words_as_before():
    "Its captions end with ` .`, a word of its language; the value is that of the version without a tokenizer."
    from mllm_replica.data.worlds.making import samples

    told = [s['answer'].replace(IMAGE_MARK, '').strip() for s in samples('pages', 'test', 10, 40, tasks=['document'])]
    written, references = [told[0]] * 20 + told[20:], [[text] for text in told]
    assert sum(cider_d(written, references, words=str.split)) / 40 == pytest.approx(5.898770011787731, abs=1e-12)
    bare = [text.removesuffix(' .') for text in told]
    assert all(caption_words(text) == text.split() for text in bare)
