"Eagle's templates, labels and pictures against the official cases; bad input, and what a sample must keep."

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_replica.data.language import byte_tokenizer, word_tokenizer
from mllm_replica.data.packing import collate, truncate
from mllm_replica.eagle.prompts import (
    SYSTEM,
    TEMPLATES,
    EagleImageProcessor,
    EagleProcessor,
    part_ids,
    prompt_text,
    with_images,
)

torch.set_num_threads(1)
TEXT = json.loads((Path(__file__).parent / 'golden/eagle/prompts_labels.json').read_text())
VISUAL, IMAGE_ID = 5, -1
case_of = pytest.mark.parametrize('case', TEXT['cases'], ids=lambda case: case['name'])


def letters(begin='<s>', vocabulary=TEXT['vocabulary']):
    "The toy tokenizer of the file: one id per character, special tokens apart."
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token='<unk>'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex('.|\n'), 'isolated'), decoders.Fuse()
    tokenizer.add_special_tokens([token for token in vocabulary if len(token) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token='</s>', unk_token='<unk>', pad_token='<unk>'
    )


def picture(width=40, height=30):
    return Image.new('RGB', (width, height), '#3465a4')


def turns(*values):
    return [{'from': ('human', 'gpt')[i % 2], 'value': value} for i, value in enumerate(values)]


def opened(conversation, times=1, value='Welcome.'):
    "The conversation after turns of the assistant's."
    return [{'from': 'gpt', 'value': value}] * times + conversation


def sample(question='<image>What?', answer='red', images=1, **more):
    return dict(id='s7', images=[picture()] * images, conversations=turns(question, answer)) | more


def processor_of(tokenizer=None, **settings):
    pictures = {name: settings.pop(name) for name in ('mode', 'tiles') if name in settings}
    return EagleProcessor(
        EagleImageProcessor(28, **pictures), tokenizer or byte_tokenizer(), VISUAL, IMAGE_ID, **settings
    )


def collapsed(encoded, values):
    "One value per image, the first of its block, as the official placeholder."
    inside = {i for start, stop in encoded.image_spans for i in range(start + 1, stop)}
    return [value for i, value in enumerate(values) if i not in inside]


# official cases


@case_of
def test_official_texts(case):
    moved = (
        with_images(case['conversation'], int(case['has_image']), 'case') if case['has_image'] else case['conversation']
    )
    assert moved == case['after_multimodal_preprocess']
    if case['prompt'] is not None:
        assert prompt_text(case['template'], moved) == case['prompt']
    assert prompt_text(case['template'], turns('<image>\nQ?')) == case['inference_prompt']


@case_of
def test_official_ids_and_labels(case):
    tokenizer = letters(TEXT['vocabulary'][case['add_bos']] if case['add_bos'] else '<s>')
    given = dict(id=case['name'], images=[picture()] * case['has_image'], conversations=case['conversation'])
    before = copy.deepcopy(given['conversations'])
    encoded = processor_of(tokenizer, template=case['template']).encode(given)
    assert [-200 if token == IMAGE_ID else token for token in collapsed(encoded, encoded.input_ids)] == case[
        'input_ids'
    ]
    assert collapsed(encoded, encoded.labels) == case['labels']
    assert len(encoded.image_spans) == case['has_image'] and given['conversations'] == before


def test_golden_cases_are_all_there():
    assert len(TEXT['cases']) == 8 and {case['template'] for case in TEXT['cases']} == set(TEMPLATES)
    assert not any(case['error'] for case in TEXT['cases'])


# what a sample must keep


@pytest.mark.parametrize('template', [*TEMPLATES, 'words'])
def test_a_prompt_is_the_beginning_of_the_training_row(template):
    if template == 'plain':
        pytest.skip('a caption is trained without the question that asks for it')
    tokenizer = word_tokenizer(['what ? red where here']) if template == 'words' else letters()
    processor = processor_of(tokenizer, template=template)
    given = sample(conversations=turns('<image> what ?', 'red', 'where ?', 'here'))
    whole, prompt = processor.encode(given), processor.encode(given, training=False)
    assert whole.input_ids[: len(prompt)] == prompt.input_ids and len(prompt) < len(whole)
    assert all(label == -100 for label in prompt.labels[-1:])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('images', [0, 1])
@pytest.mark.parametrize('template', [*TEMPLATES, 'words'])
def test_what_the_assistant_says_before_the_first_question_is_dropped(template, images, training):
    "As officially; the sample itself stays, and an image without a tag still goes to the first question."
    tokenizer = word_tokenizer(['what ? red where here']) if template == 'words' else letters()
    processor, later = processor_of(tokenizer, template=template), turns('what ?', 'red', 'where ?', 'here')
    plain, late = (sample(images=images, conversations=c) for c in (later, opened(later)))
    before = copy.deepcopy(late['conversations'])
    expected, found = (processor.encode(given, training=training) for given in (plain, late))
    assert (found.input_ids, found.labels) == (expected.input_ids, expected.labels)
    assert found.image_spans == expected.image_spans and late['conversations'] == before
    if template != 'words':
        assert prompt_text(template, opened(later)) == prompt_text(template, later)


def test_every_image_keeps_its_places():
    encoded = processor_of().encode(
        sample(
            '<image> or <image>?',
            images=2,
            conversations=turns('<image> or <image>?', 'b', 'And <image>?', 'c'),
        )
        | dict(images=[picture()] * 3)
    )
    assert len(encoded.image_spans) == 3 and all(
        encoded.input_ids[a:b] == [IMAGE_ID] * VISUAL for a, b in encoded.image_spans
    )
    assert encoded.input_ids.count(IMAGE_ID) == 3 * VISUAL


def test_marks_of_a_user_are_plain_text():
    tokenizer = letters()
    typed = processor_of(tokenizer, template='yi_34b_chatml_direct').encode(
        sample('<image><|im_end|></s>', 'a<|im_end|>')
    )
    assert (
        typed.input_ids.count(tokenizer.convert_tokens_to_ids('<|im_end|>')) == 3
        and tokenizer.eos_token_id not in typed.input_ids
    )
    assert tokenizer.decode([label for label in typed.labels if label != -100]) == 'a<|im_end|><|im_end|>'


def test_truncation_and_batches():
    processor = processor_of()
    rows = [processor.encode(sample()), processor.encode(sample('What?', 'blue', images=0))]
    batch = collate(rows, pad_token_id=0, image_tensor=processor.image_tensor)
    assert batch['pixel_values'].shape == (1, 3, 28, 28) and (batch['input_ids'] == IMAGE_ID).sum(1).tolist() == [
        VISUAL,
        0,
    ]
    with pytest.raises(ValueError, match='nothing supervised is left'):
        truncate(rows[0], rows[0].image_spans[0][1] - 1)


def test_documents_have_no_turns():
    given = dict(id='d', images=[picture()] * 2, document='one <image> two <image> three')
    encoded = processor_of(template='llama3').encode(given)
    assert len(encoded.image_spans) == 2 and encoded.input_ids[0] == 1 and encoded.labels[-1] == 2
    with pytest.raises(ValueError, match="sample 'd': 2 <image> placeholders, 1 images"):
        processor_of().encode(given | dict(images=[picture()]))


@pytest.mark.parametrize('mode,expected', [('pad', (122, 116, 104)), ('crop', (52, 101, 164))])
def test_the_corner_of_a_wide_picture(mode, expected):
    processor = processor_of(mode=mode)
    pixels = processor.image_tensor([picture(60, 30), picture(30, 60), picture(28, 28)])
    colour = pixels[:, :, 0, 0] * torch.tensor(processor.image_processor.image_std) + torch.tensor(
        processor.image_processor.image_mean
    )
    assert (colour[0] * 255).round().int().tolist() == list(expected)
    assert (colour[2] * 255).round().int().tolist() == [52, 101, 164]


def test_settings_survive_saving(tmp_path):
    processor = processor_of(template='plain', mode='crop', begin=False)
    processor.save_pretrained(tmp_path)
    again = EagleProcessor.from_pretrained(tmp_path)
    assert (again.template, again.image_processor.mode, again.begin) == ('plain', 'crop', False)
    assert again.encode(sample()).input_ids == processor.encode(sample()).input_ids


# bad input


@pytest.mark.parametrize(
    'given,message',
    [
        (sample(images=2), "sample 's7': 1 <image> placeholders, 2 images"),
        (sample(images=0), "sample 's7': 1 <image> placeholders, 0 images"),
        (sample(conversations=turns('<image>?', '<image>')), 'the answer in turn 1 contains <image>'),
        (sample(conversations=turns('<image>?', '\n')), 'the answer in turn 1 is empty'),
        (
            sample(conversations=turns('<image>?', 'a', 'b', 'c')[:1] * 2),
            "the roles are .'human', 'human'.; expected human and gpt",
        ),
        (sample(conversations=opened(turns('<image>?', 'a'), 2)), "the roles are .'gpt', 'gpt', 'human', 'gpt'.;"),
        (sample(conversations=opened([])), "the roles are .'gpt'.; expected human and gpt in turn"),
        (sample(conversations=opened(turns('?', 'a'), value='See <image>.')), 'the answer in turn 0 contains <image>'),
        (sample(conversations=opened(turns('<image>?', ''))), 'the answer in turn 2 is empty'),
        (sample(conversations=[]), 'the roles are ..; expected human'),
        (sample(conversations=turns('<image>?')), 'nothing is supervised'),
    ],
)
def test_samples_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        processor_of().encode(given)


@pytest.mark.parametrize(
    'settings,message',
    [(dict(template='v1'), "template 'v1' is unknown"), (dict(mode='fill'), "image mode 'fill' is unknown")],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        processor_of(**settings)


def test_tokenizers_that_do_not_fit():
    with pytest.raises(ValueError, match='has no token <|im_start|>'):
        processor_of(template='yi_34b_chatml_direct').encode(sample())
    bare = letters()
    bare.bos_token = None
    with pytest.raises(ValueError, match='no begin token; set begin=False'):
        processor_of(bare)
    joining = word_tokenizer([f'{SYSTEM} user : what ? red'])
    with pytest.raises(ValueError, match="does not know .'shape'"):
        processor_of(joining, template='words').encode(sample('<image> shape ?'))


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    vocabulary = {chr(i): i for i in range(32, 127)} | {'\n': 10, '<s>': 1, '</s>': 2, ': ': 200, ': y': 201}
    joining = Tokenizer(models.BPE(vocabulary, [(':', ' '), (': ', 'y')]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining, bos_token='<s>', eos_token='</s>', pad_token='</s>')
    with pytest.raises(ValueError, match="joins the end of the question and the answer 'yes'"):
        processor_of(tokenizer).encode(sample(answer='yes'))
    assert None in part_ids(tokenizer, [('{}', 'a<image>')])
