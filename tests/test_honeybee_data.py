"Stored data sets of Honeybee in their templates: every source of the paper's recipes from files to token ids."

import json

import pytest
from PIL import Image
from toys import save_backbones

from mllm_replica.core.settings import settings
from mllm_replica.data.encoded import IGNORED
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.honeybee import recipes
from mllm_replica.honeybee.data import examples_of, in_template
from mllm_replica.honeybee.model import HoneybeeProcessor
from mllm_replica.models import backbones
from mllm_replica.models.image_processing import VisionLanguageImageProcessor
from mllm_replica.honeybee.prompts import SYSTEM, SYSTEM_DETAIL
from mllm_replica.honeybee.recipes import load_source, recipe
from mllm_replica.running import unit

SHORT = 'Answer the question using a single word or phrase. '
LETTER = "Answer with the option's letter from the given choices directly. "


def record(name, question, answer, image='a.png', **more):
    asked = f'<image>\n{question}'.strip() if image else question
    return dict(
        id=name, conversations=[{'from': 'human', 'value': asked}, {'from': 'gpt', 'value': answer}], **more
    ) | ({'image': image} if image else {})


RECORDS = {
    'vqav2': [record('v', 'what?', 'cat')],
    'gqa': [
        record(f'g{i}', f'q{i}?', ['bed', 'bed', 'yes', 'no'][i % 4], 'a.png' if i < 12 else 'b.png') for i in range(16)
    ],
    'ocrvqa': [record('o', 'title?', 'Emma')],
    'vsr': [record('s', 'The cat is on the mat.', 'yes')],
    'scienceqa': [
        record('sq0', 'Why?', 'up', options=['up', 'down'], context='N/A'),
        record('sq1', 'Which?', 'x', None, options=['x', 'y', 'z']),
    ],
    'aokvqa': [record('ao', 'Who?', 'me', options=['you', 'me', 'they', 'us'])],
    **{
        name: [record(f'r{i}', '', 'the dog', box=[10, 20, 30, 40], width=100, height=200) for i in range(9)]
        for name in ('refcoco', 'refcoco_plus', 'refcocog', 'vg')
    },
    **{name: [record('c', '', 'a red dog')] for name in ('coyo', 'coyo_pairs', 'blipcapfilt')},
    'llava150k': [record('l', 'Describe.', 'It is red.')],
    'sharegpt': [record('t', 'Hello?', 'Hi.', None)],
    'mme': [record('m', 'Is it red? Please answer yes or no.', 'Yes')],
    'pope': [record('p', 'Is there a dog?', 'yes')],
    'seed': [record('e', 'How many?', 'two', options=['one', 'two', 'three', 'four'])],
    'mmbench': [record('b', 'Q', 'b', options=['a', 'b'])],
}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The sources of a row of the paper, and the folder in which all of them lie."
    root, found = tmp_path_factory.mktemp('project') / 'data', recipe('6', 'honeybee_c_7b', 'paper', 42).sources
    for source in found.values():
        folder = root / source.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in ('a.png', 'b.png'):
            Image.new('RGB', (4, 4), 'red' if name == 'a.png' else 'blue').save(folder / name)
        lines = '\n'.join(json.dumps(r) for r in RECORDS[source.name.split('/')[1]])
        (folder / f'{source.split}.jsonl').write_text(lines)
    return root, found
    return root, found


def loaded(sources, name, **options):
    root, found = sources
    source = found[name]
    return load_source(source.model_copy(update={'options': source.options | options}), 0, root)


def test_every_source_of_the_paper_becomes_token_ids(sources):
    processor = HoneybeeProcessor(VisionLanguageImageProcessor(8), byte_tokenizer(), visual_tokens=4)
    for name in sources[1]:
        data, asked = loaded(sources, name), name.startswith('test_')
        encoded = [processor.encode(sample, training=not asked) for sample in data]
        assert encoded and all(
            len(e.images) == len(sample['images']) == len(e.image_spans) for e, sample in zip(encoded, data)
        )
        supervised = [any(label != IGNORED for label in e.labels) for e in encoded]
        assert not any(supervised) if asked else all(supervised), name
        assert len(set(data['id'])) == len(data)


@pytest.mark.parametrize(
    'name, prompt',
    [
        ('vqav2', f'{SYSTEM}\nHuman: <image>\nHuman: {SHORT}what?\nAI: cat'),
        ('vsr', f'{SYSTEM}\nHuman: <image>\nHuman: {SHORT}Is the cat on the mat? Please answer yes or no.\nAI: yes'),
        ('coyo', '[NO_PROMPT] <image> a red dog'),
        ('test_mme', f'{SYSTEM}\nHuman: <image>\nHuman: {SHORT}Is it red? Please answer yes or no.\nAI: '),
        (
            'test_mmbench',
            f'{SYSTEM}\nHuman: <image>\nHuman: {LETTER}Q\nContext: N/A\nThere are several options:\nA. a\nB. b\nC. N/A\nD. N/A\nE. N/A\n\nAI: ',
        ),
        (
            'test_seed',
            f'{SYSTEM}\nHuman: <image>\nHuman: {LETTER}How many?\nThere are several options:\nA. one\nB. two\nC. three\nD. four\n\n\nAI: ',
        ),
    ],
)
def test_the_words_of_a_template(sources, name, prompt):
    assert loaded(sources, name)['prompt'][:] == [prompt]


def test_conversations_keep_their_own_words(sources):
    data = loaded(sources, 'llava150k')
    assert 'prompt' not in data.column_names
    processor = HoneybeeProcessor(VisionLanguageImageProcessor(8), byte_tokenizer(), visual_tokens=4)
    assert processor.pieces(data[0], True)[0].text == SYSTEM_DETAIL


def test_questions_of_a_picture_are_grouped_and_repeated_answers_drawn(sources):
    def turns(data):
        return [
            (prompt.count('Human: ') - 1, sample['images'][0]['path'][-5:])
            for prompt, sample in zip(data['prompt'], data)
        ]

    assert turns(loaded(sources, 'gqa')) == [(3, 'a.png'), (3, 'b.png')]  # bed, yes, no
    assert turns(loaded(sources, 'gqa', dedup=False)) == [(10, 'a.png'), (2, 'a.png'), (4, 'b.png')]
    assert turns(loaded(sources, 'gqa', turns=1)) == [(1, 'a.png')] * 12 + [(1, 'b.png')] * 4
    again = [in_template(load_plain(sources, 'gqa'), 'gqa', n, 10, True)['prompt'][:] for n in (1, 2, 3, 4)]
    assert len({prompts[0] for prompts in again}) > 1  # which of the repeated ones stays is drawn
    assert loaded(sources, 'gqa')['answer'][:] == ['no', 'no']


def load_plain(sources, name):
    "The stored data set, without a template."
    source = sources[1][name]
    return load_source(source.model_copy(update={'options': {}}), 0, sources[0])


def test_options_are_shuffled_in_training_only(sources):
    trained = {loaded_with(sources, 'aokvqa', seed)['answer'][0] for seed in range(20)}
    assert trained == set('ABCD')
    for seed in range(20):
        prompt, letter = (loaded_with(sources, 'aokvqa', seed)[0][key] for key in ('prompt', 'answer'))
        assert f'{letter}. me\n' in prompt and prompt.endswith(f'AI: {letter}')
    assert {loaded_with(sources, 'test_seed', seed)['answer'][0] for seed in range(20)} == {'B'}
    texts = loaded(sources, 'scienceqa')
    assert ['<image>' in prompt for prompt in texts['prompt']] == [True, False] and 'Context: N/A' in texts['prompt'][1]


def loaded_with(sources, name, seed):
    return load_source(sources[1][name], seed, sources[0])


def test_both_directions_of_a_region_occur(sources):
    prompts = loaded(sources, 'refcoco')['prompt'][:]
    ends = {prompt.split('AI: ')[1] for prompt in prompts}
    assert ends == {'[0.100,0.100,0.400,0.300]', 'the dog'}


def test_what_a_template_lacks_is_named(sources):
    with pytest.raises(ValueError, match="sample 'v': template 'aokvqa' wants 'option'"):
        loaded(sources, 'vqav2', template='aokvqa')
    with pytest.raises(ValueError, match=r"does not know the options \['shuffle'\]"):
        loaded(sources, 'vqav2', shuffle=True)
    with pytest.raises(ValueError, match="no template 'coco'"):
        loaded(sources, 'vqav2', template='coco')


def test_several_turns_of_a_record_are_several_questions():
    turns = [
        {'from': role, 'value': value}
        for role, value in (('human', '<image>\na?'), ('gpt', 'x'), ('human', 'b?'), ('gpt', 'y'))
    ]
    found = examples_of(dict(id='s', conversations=turns, options=[], meta=''), 'gqa')
    assert [(e['id'], e['question'], e['answer']) for e in found] == [('s.0', 'a?', 'x'), ('s.1', 'b?', 'y')]


def test_a_unit_of_the_paper_on_small_backbones(sources, tmp_path, monkeypatch):
    whole = recipe('6', 'honeybee_c_7b', 'paper', 42)
    folders = {name: str(tmp_path / part) for part, name in whole.model['backbones'].items()}
    save_backbones(tmp_path)
    small = {'projector_type': 'c-abs', 'num_query_tokens': 16, 'hidden_size': 32, 'depth': 1, 'mlp_depth': 2}
    short = tuple(
        s.model_copy(update={'steps': 2, 'batch_size': 4, 'warmup_steps': 1, 'precision': 'fp32'}) for s in whole.stages
    )
    changed = whole.model_copy(
        update={
            'model': {'connector': small, 'feature_layer': -2, 'backbones': whole.model['backbones']},
            'stages': short,
            'benchmarks': tuple(b.model_copy(update={'max_new_tokens': 2}) for b in whole.benchmarks),
        }
    )
    local = settings().model_copy(update={'backbones': folders})  # read before the project's folder is another one
    monkeypatch.setattr(backbones, 'settings', lambda: local)
    monkeypatch.setattr(recipes, 'recipe', lambda *_: changed)
    monkeypatch.setattr('mllm_replica.core.settings.work_folder', lambda: sources[0].parent)
    monkeypatch.setattr('mllm_replica.core.settings.project_root', lambda: sources[0].parent)
    result = unit.run_unit(changed, tmp_path / 'unit')
    assert result.steps == 4 and {'mme', 'pope', 'seed', 'mmbench', 'scienceqa'} <= set(result.metrics)
