"Answers do not depend on batches, order, processes or what questions on one picture share; memory stays flat."

import gc
import io
import random

import psutil
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from toys import model_of
from transformers import logging
from variants import VARIANTS, variant

from mllm_replica.core.registry import PAPERS
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.eagle.prompts import EagleProcessor
from mllm_replica.honeybee.model import HoneybeeProcessor
from mllm_replica.mm1.model import MM1Processor, at_resolution
from mllm_replica.owl2.processor import Owl2Processor
from mllm_replica.owl3.processor import Owl3Processor
from mllm_replica.scoring.answering import answered, beginning, obstacle, plan
from mllm_replica.scoring.evaluation import collate_prompts, greedy

torch.set_num_threads(1)
KINDS = dict(honeybee=HoneybeeProcessor, owl2=Owl2Processor, mm1=MM1Processor, eagle=EagleProcessor, owl3=Owl3Processor)
CHATML = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')
HOW = dict(honeybee=dict(system='Talk.'), eagle=dict(template='words'), owl3=dict(placeholder='9:'))  # few letters
NEW = 4


def picture(number, size=20):
    "The bytes of a picture of its own colours."
    drawn = Image.linear_gradient('L').resize((size, size)).rotate(90 * number)
    colours = [[(number * step * (i + 1)) % 256 for i in range(3)] for step in (53, 91)]
    file = io.BytesIO()
    Image.composite(*(Image.new('RGB', drawn.size, tuple(colour)) for colour in colours), drawn).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)


def sample(id, text, *pictures):
    turns = [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': ''}]
    return dict(id=id, images=[picture(n) for n in pictures], conversations=turns)


def samples(counts, written='<image>{}', pictures=1):
    "Questions of several lengths, so many on each picture."
    return [
        sample(f'{n}-{i}', written.format(f'Is it {"so " * (i * 7 % 5)}{i}?'), *range(10 * n, 10 * n + pictures))
        for n, count in enumerate(counts)
        for i in range(count)
    ]


class Numbers:
    "A processor that says the numbers of the tokens."

    def __init__(self, processor):
        self.processor = processor

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def decode(self, ids):
        return str(list(ids))


def processor_of(paper, model, **how):
    "For the model, which learns the marks of a chat."
    logging.set_verbosity_error()
    tokenizer = byte_tokenizer()
    if paper == 'owl3':
        tokenizer.add_tokens([AddedToken(name, special=True) for name in CHATML])
    model.resize_token_embeddings(len(tokenizer))
    return Numbers(KINDS[paper].from_config(model.config, tokenizer, **HOW.get(paper, {}) | how))


@pytest.fixture(scope='module', params=PAPERS)
def pair(request):
    "A model that looks at its pictures, and its processor."
    model = model_of(request.param)
    model.connector.register_forward_hook(lambda module, given, out: 5 * torch.sin(60 * out))  # pictures differ much
    return model, processor_of(request.param, model)


def plainly(model, processor, asked):
    "Each question by itself."
    found = {}
    for one in asked:
        batch = collate_prompts([processor.encode(one, training=False)], processor)
        found[one['id']] = processor.decode(greedy(model, batch, NEW)[0])
    return found


def said(pair, asked, **how):
    found = [row for batch in answered(*pair, asked, max_new_tokens=NEW, **how) for row in batch]
    assert sorted(id for id, _ in found) == sorted(one['id'] for one in asked)
    return dict(found)


def begun(processor, asked):
    return beginning([processor.encode(one, training=False) for one in asked])


def test_answers_are_those_of_each_question_alone(pair):
    asked = samples([1, 4, 4, 16])
    want = plainly(*pair, asked)
    assert begun(pair[1], asked[1:5]) and any(want[f'2-{i}'] != want[f'3-{i}'] for i in range(4)), 'nothing is shown'
    assert said(pair, asked, batch_size=8, workers=2) == want
    assert said(pair, asked, batch_size=8, reuse=False) == want
    assert said(pair, random.Random(0).sample(asked, len(asked)), batch_size=5, workers=1) == want


@pytest.mark.nightly
def test_no_batch_and_no_order_changes_an_answer(pair):
    asked = samples([1, 2, 3, 4, 5, 5, 16, 1])
    want = plainly(*pair, asked)
    for batch_size, workers in ((1, 0), (1, 2), (3, 1), (4, 2), (8, 0), (32, 1)):
        mixed = random.Random(batch_size).sample(asked, len(asked))
        for reuse in (False, True):
            assert said(pair, mixed, batch_size=batch_size, workers=workers, reuse=reuse, window=2) == want


@pytest.mark.nightly
@pytest.mark.parametrize('name', VARIANTS)
def test_other_parts(name):
    model = variant(name)
    paper = model.config.model_type
    pair = model, processor_of(paper, model)
    asked = samples([1, 4, 9])
    want = plainly(*pair, asked)
    assert said(pair, asked, batch_size=4) == want == said(pair, asked, batch_size=8, reuse=False)


def test_a_beginning_ends_anywhere_behind_the_pictures(pair):
    for written, pictures in (('<image>\nThe same words before: {}', 1), ('<image>and<image>: {}', 2)):
        asked = samples([1, 3], written, pictures)
        assert begun(pair[1], asked[1:]) > begun(pair[1], samples([3]))
        assert said(pair, asked, batch_size=4) == plainly(*pair, asked)


def test_pictures_behind_the_question_are_encoded_once(pair):
    model, processor = pair
    asked, seen = samples([1, 3, 2], '{} <image>'), []
    assert not begun(processor, asked[1:4]) or model.config.model_type in ('honeybee', 'eagle')  # put pictures first
    want = plainly(model, processor, asked)
    patches = next(part for part in model.vision_model.modules() if isinstance(part, torch.nn.Conv2d))
    hook = patches.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    assert said(pair, asked, batch_size=3) == want
    hook.remove()
    assert sum(seen) == 3


def test_the_same_question_twice_and_other_turns(pair):
    asked = samples([3])
    asked += [dict(asked[0], id='again')]
    turns = [{'from': 'gpt', 'value': 'Yes.'}, {'from': 'human', 'value': 'Sure?'}, {'from': 'gpt', 'value': ''}]
    asked += [dict(one, id=f'{one["id"]}, then', conversations=one['conversations'][:1] + turns) for one in asked]
    found = said(pair, asked, batch_size=4)
    assert found == plainly(*pair, asked) and found['again'] == found['0-0']


def test_settings_of_the_answers_are_honoured(pair, monkeypatch):
    model, _ = pair
    asked = samples([4, 1])
    free = plainly(*pair, asked)
    monkeypatch.setattr(model.generation_config, 'repetition_penalty', 1.3)
    some = [int(token) for token in plainly(*pair, asked)['0-1'][1:-1].split(',')]
    monkeypatch.setattr(model.generation_config, 'eos_token_id', [2, some[1]])
    want = plainly(*pair, asked)
    assert want != free and len({len(answer.split(',')) for answer in want.values()}) > 1, 'all end together'
    assert said(pair, asked, batch_size=4) == want


def counted(pair, asked, **how):
    "Tokens that the language model reads."
    layer, seen = pair[0].get_decoder().layers[0], []
    hook = layer.register_forward_hook(lambda module, given, out: seen.append(out.shape[:2].numel()))
    said(pair, asked, **how)
    hook.remove()
    return sum(seen)


@pytest.mark.parametrize('k', (4, 16))
def test_what_is_shared_is_read_once(pair, k):
    asked = [sample(str(i), f'<image>{"Look well. " * 5}{chr(97 + i)}?', 1) for i in range(k)]
    lengths = [len(pair[1].encode(one, training=False)) for one in asked]
    shared, answers = begun(pair[1], asked), k * (NEW - 1)
    assert counted(pair, asked, batch_size=16, reuse=False) == sum(lengths) + answers
    assert (
        counted(pair, asked, batch_size=16)
        == counted(pair, asked, batch_size=2)
        == (shared + sum(lengths) - k * shared + answers)
    )


def test_a_placeholder_is_never_said():
    model = model_of('mm1')
    model.resize_token_embeddings(262)
    number, head = model.config.image_token_id, model.get_output_embeddings().weight
    processor = Numbers(MM1Processor.from_config(model.config, byte_tokenizer()))
    asked = samples([4])
    want = plainly(model, processor, asked)
    with torch.no_grad():  # more than anything that is said
        head[number] = 9 * head[int(want['0-0'][1:].split(',')[0])]
    assert said((model, processor), asked, batch_size=4) == plainly(model, processor, asked)
    assert str(number) not in str(want)


def test_questions_on_one_video():
    model = model_of('owl3')
    processor = processor_of('owl3', model)
    asked = [dict(one, videos=[one['images']], images=[]) for one in samples([1, 3], '<video>{}', pictures=2)]
    assert begun(processor, asked[1:])
    assert said((model, processor), asked, batch_size=4) == plainly(model, processor, asked)


@pytest.mark.nightly
@pytest.mark.parametrize('written', ('<image>{}', '{} <image>'))
@pytest.mark.parametrize('paper', ('mm1', 'eagle', 'owl3'))
def test_pictures_that_are_cut(paper, written):
    model = model_of(paper)
    if paper == 'mm1':
        model = at_resolution(model, 16, 32)
    if paper == 'eagle':
        model = type(model)(type(model.config).from_dict(model.config.to_dict() | dict(tiles=2))).eval()
    processor = processor_of(paper, model, **dict(cropping=True) if paper == 'owl3' else {})
    asked = samples([1, 3, 3], written)
    assert said((model, processor), asked, batch_size=6) == plainly(model, processor, asked)


# what makes a batch


@pytest.mark.parametrize('batch_size', (1, 4, 8))
def test_a_plan_has_everything_once(batch_size):
    draw = random.Random(batch_size)
    looks = [(tuple(draw.sample('abcdefgh', draw.choice((0, 1, 1, 2)))), draw.randrange(99)) for _ in range(100)]
    for reuse in (False, True):
        batches = plan(looks, 1000, batch_size, reuse)
        assert sorted(n for batch in batches for group in batch for n in group) == list(range(1000, 1100))
        for batch in batches:
            assert len({len(group) for group in batch}) == 1
            assert len(batch) == 1 or len(batch) * len(batch[0]) <= batch_size
            assert all(len({looks[n - 1000][0] for n in group}) == 1 for group in batch)
        found = [looks[n - 1000] for batch in batches for group in batch for n in group]
        if not reuse:  # as even as can be
            assert found == sorted(found, key=lambda look: (-len(look[0]), -look[1]))


def test_no_beginning_without_the_same_pictures_before_it():
    def prompt(ids, *spans, names='ab'):
        return Encoded('x', list(ids), [-100] * len(ids), list(names[: len(spans)]), list(spans), list(spans))

    one = prompt([1, 9, 9, 9, 9, 5, 6], (1, 3), (3, 5))
    assert beginning([one, prompt([1, 9, 9, 9, 9, 5, 7], (1, 3), (3, 5))]) == 6
    assert beginning([one, prompt([1, 9, 9, 9, 9, 5, 7], (1, 3), (3, 5), names='ba')]) == 0
    assert beginning([one, prompt([1, 9, 9, 9, 9, 5, 7], (1, 5))]) == 0
    assert beginning([prompt([1, 5, 9, 9, 6], (2, 4)), prompt([1, 4, 9, 9, 6], (2, 4))]) == 0
    assert beginning([prompt([1, 5, 6]), prompt([1, 5, 7])]) == 0  # no picture: nothing to gain


class Read:
    "Samples that note who was asked for."

    def __init__(self, count, per_picture=2, size=0):
        self.count, self.per_picture, self.size, self.read = count, per_picture, size, set()
        self.file = picture(0)['bytes']

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        self.read.add(number)
        turns = [{'from': 'human', 'value': f'<image>{number}?'}, {'from': 'gpt', 'value': ''}]
        file = self.file + bytes(self.size) + str(number // self.per_picture).encode()  # decoders do not read on
        return dict(id=str(number), images=[dict(bytes=file, path=None)], conversations=turns)


@pytest.fixture(scope='module')
def quick():
    model = model_of('mm1')
    return model, MM1Processor.from_config(model.config, byte_tokenizer())


def test_batches_come_one_by_one_and_are_the_same_in_any_processes(quick):
    asked, found = Read(40), {}
    batches = answered(*quick, asked, max_new_tokens=1, batch_size=4, window=2)
    first = next(batches)
    assert len(first) == 4 and max(asked.read) < 8
    batches.close()
    for workers in (0, 1, 2):
        found[workers] = list(answered(*quick, Read(40), max_new_tokens=1, batch_size=4, workers=workers, window=2))
    assert found[0] == found[1] == found[2] and found[0][0] == first
    left = [asked[n] for n in range(40) if str(n) not in dict(first)]  # a stopped run goes on
    rest = dict(row for batch in answered(*quick, left, max_new_tokens=1, batch_size=4) for row in batch)
    assert dict(first) | rest == dict(row for batch in found[0] for row in batch)


def test_nothing_else_is_changed(quick):
    model, _ = quick
    model.train()
    state, said = torch.get_rng_state(), answered(*quick, Read(4), max_new_tokens=1)
    next(said)
    assert not model.training
    said.close()
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert list(answered(*quick, [], max_new_tokens=1)) == []


@pytest.mark.parametrize('workers', (0, 2))
def test_a_broken_sample_is_named(quick, workers):
    for broken, message in (
        (sample('bad', 'no mark', 1), "sample 'bad': 0 <image> placeholders, 1 images"),
        (
            dict(sample('bad', '<image>?'), images=[{'bytes': None, 'path': '/none.png'}]),
            "sample 'bad'.*an image is missing",
        ),
        (dict(sample('bad', '<image>?'), images=[{'bytes': b'no picture', 'path': 'a.png'}]), 'a.png: not a readable'),
    ):
        with pytest.raises(ValueError, match=message.replace('<', '.')):
            list(answered(*quick, [sample('good', '<image>?', 1), broken], max_new_tokens=1, workers=workers))


def test_what_cannot_go_on_from_a_beginning_says_so(quick, monkeypatch):
    model, processor = quick
    asked = samples([3])
    assert obstacle(model) == ''
    for name, value in dict(
        num_beams=2, use_cache=False, no_repeat_ngram_size=2, cache_implementation='static'
    ).items():
        with monkeypatch.context() as patch:
            patch.setattr(model.generation_config, name, value)
            with pytest.warns(UserWarning, match=f'MM1Model .* itself: its generation_config has {name}={value!r}'):
                found = said((model, Numbers(processor)), asked)
            assert found == plainly(model, Numbers(processor), asked)
    text = model.config.text_config
    text.layer_types, text.sliding_window = ['sliding_attention'] * text.num_hidden_layers, 4
    assert obstacle(model) == 'its attention slides over a window'
    del text.layer_types, text.sliding_window


def resident():
    "Megabytes of this process and of those it started."
    own = psutil.Process()
    return sum(process.memory_info().rss for process in [own, *own.children()]) / 2**20


def grown(pair, count, **how):
    "Growth of the memory after the first fifth of the questions, of which each two bring a megabyte."
    at = []
    for number, _ in enumerate(answered(*pair, Read(count, size=2**20), max_new_tokens=1, batch_size=8, **how)):
        if number % 4 == 0:
            gc.collect()
            at.append(resident())
    return max(at) - max(at[: len(at) // 5])


def test_memory_stays_flat(quick):
    assert grown(quick, 320, window=4) < 40  # 160 pictures of a megabyte


@pytest.mark.nightly
@pytest.mark.parametrize('workers', (0, 2))
def test_memory_stays_flat_for_two_thousand_questions(quick, workers):
    assert grown(quick, 2000, workers=workers) < 60  # a thousand pictures of a megabyte
