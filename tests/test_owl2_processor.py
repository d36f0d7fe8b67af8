"""The processor of mPLUG-Owl2 against the official cases; modes of pictures, bad input, and what a sample must keep."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from mllm_replica.data.images import ImageError
from mllm_replica.data.language import byte_tokenizer, word_tokenizer
from mllm_replica.data.packing import collate, truncate
from mllm_replica.owl2.processor import (
    MODES,
    PROMPTS,
    SYSTEM,
    Owl2ImageProcessor,
    Owl2Processor,
    image_first,
    prompt_ids,
    prompt_text,
    to_square,
)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden' / 'owl2'
TEXT = json.loads((GOLDEN / 'prompts_and_labels.json').read_text())
SYSTEMS = {'mplug_owl2': '', 'v1': SYSTEM}
VISUAL, IMAGE_ID = 5, -1


def picture(width=40, height=30, shift=0):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (255 - x + shift) % 256], -1).astype(np.uint8))


def turns(*values):
    return [{'from': ('human', 'gpt')[i % 2], 'value': value} for i, value in enumerate(values) if value is not None]


def sample(question='<image> what ?', answer='red', images=1, **more):
    return dict(id='s7', images=[picture(shift=i) for i in range(images)], conversations=turns(question, answer)) | more


def collapsed(encoded, values):
    "One value per image, the first of its block, as the official placeholder."
    inside = {i for start, stop in encoded.image_spans for i in range(start + 1, stop)}
    return [value for i, value in enumerate(values) if i not in inside]


def processor_of(style='chat', tokenizer=None, **settings):
    pictures = {name: settings.pop(name) for name in ('mode', 'image_mean', 'image_std') if name in settings}
    reader = Owl2ImageProcessor(28, **pictures)
    return Owl2Processor(reader, tokenizer or byte_tokenizer(), VISUAL, IMAGE_ID, style=style, **settings)


@pytest.fixture(scope='module')
def chat():
    return processor_of()


# official cases


@pytest.mark.parametrize(
    'case', TEXT['prompts'], ids=lambda case: f'{case["template"]}-{len(case["turns"])}-{case["turns"][0][:14]}'
)
def test_official_prompt(case):
    assert prompt_text(turns(*case['turns']), SYSTEMS[case['template']]) == case['prompt']


@pytest.mark.parametrize('case', TEXT['image_token'], ids=lambda case: case['text'])
def test_official_tokens_around_placeholders(case):
    assert [-200 if token is None else token for token in prompt_ids(byte_tokenizer(), case['text'])] == case[
        'input_ids'
    ]


@pytest.mark.parametrize(
    'case', TEXT['labels'], ids=lambda case: f'{case["template"]}-{len(case["turns"])}-{case["turns"][0][:14]}'
)
def test_official_ids_and_labels(case):
    moved = [image_first(text) if i % 2 == 0 else text for i, text in enumerate(case['turns'])]
    assert moved == case['after_preprocess_multimodal']
    training = case['template'] == 'v1'  # this style moves the image itself; the other is handed the moved turns
    given = dict(
        id='golden',
        images=[picture()] * case['has_image'],
        conversations=turns(*(case['turns'] if training else moved)),
    )
    before = copy.deepcopy(given)
    encoded = processor_of('training' if training else 'chat').encode(given)
    ids = collapsed(encoded, encoded.input_ids)
    assert [-200 if token == IMAGE_ID else token for token in ids] == case['input_ids']
    assert collapsed(encoded, encoded.labels) == case['labels']
    assert (
        len(encoded) == len(case['input_ids']) + (VISUAL - 1) * case['has_image']
        and len(encoded.image_spans) == case['has_image']
    )
    assert given == before


def test_golden_cases_are_all_there():
    assert [len(TEXT[kind]) for kind in ('prompts', 'image_token', 'labels')] == [8, 5, 6]


def test_official_pictures():
    with safe_open(GOLDEN / 'image_preprocess.safetensors', 'pt') as file:
        count = sum(key.startswith('in.image.') for key in file.keys())
        pictures = [Image.fromarray(file.get_tensor(f'in.image.{i}').numpy()) for i in range(count)]
        assert count == 3 and len({image.size for image in pictures}) > 1
        for mode, name in zip(MODES, ('resize', 'pad', 'plain')):
            pixels = processor_of(mode=mode).image_tensor(pictures)  # pictures of different sizes in one batch
            expected = torch.stack([file.get_tensor(f'out.{name}.{i}').reshape(pixels.shape[1:]) for i in range(count)])
            torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


# a tokenizer that behaves as LLaMA's: a space before every text, which is part of the word that follows it


def llama_like(*joined):
    letters = [chr(i) for i in range(33, 127)] + ['▁', '\n']
    merges = [('▁', 'y'), ('▁y', 'e'), ('▁ye', 's'), *joined]
    vocabulary = {token: i for i, token in enumerate(['<unk>', '<s>', '</s>', *letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def test_the_space_before_an_answer_belongs_to_its_first_word():
    processor = processor_of(tokenizer=llama_like())
    encoded = processor.encode(
        sample('<image> is it ?', 'yes', conversations=turns('<image> is it ?', 'yes', 'sure ?', 'yes'))
    )
    tokens = processor.tokenizer.convert_ids_to_tokens([token for token in encoded.labels if token != -100])
    assert tokens == ['▁yes', '</s>', '▁yes', '</s>']
    kept = processor.tokenizer.convert_ids_to_tokens([token for token in encoded.input_ids if token != IMAGE_ID])
    assert ''.join(kept) == '<s>▁USER:▁▁▁is▁it▁?▁ASSISTANT:▁yes</s>▁USER:▁sure▁?▁ASSISTANT:▁yes</s>'
    assert processor.tokenizer.pad_token == '<unk>'


def test_a_tokenizer_that_joins_colon_and_answer_is_refused():
    processor = processor_of(tokenizer=llama_like((':', '▁yes')))
    with pytest.raises(ValueError, match="^sample 's7': the tokenizer joins 'ASSISTANT:' and the answer ' yes'"):
        processor.encode(sample(answer='yes'))
    assert len(processor.encode(sample(answer='no')))


# pictures


def test_modes_show_what_they_say():
    wide = Image.new('RGB', (60, 20), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 20, 20))
    wide.paste((0, 0, 255), (40, 0, 60, 20))
    rows = {mode: np.asarray(to_square(wide, 30, mode)) for mode in MODES}
    assert [rows['resize'][15, x].tolist() for x in (3, 15, 27)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert rows['resize'][:, 3].min(0).tolist() == [255, 0, 0]  # the full height
    assert rows['pad'][3, 15].tolist() == [122, 116, 104] and rows['pad'][15, 3].tolist() == [255, 0, 0]
    assert (rows['crop'][:, 5:25] == [0, 255, 0]).all()  # the middle third alone


@pytest.mark.parametrize('mode', MODES)
def test_a_picture_of_the_right_size_passes_unchanged(mode):
    image = picture(28, 28)
    assert np.array_equal(np.asarray(to_square(image, 28, mode)), np.asarray(image))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (29, 28), (1000, 3)])
def test_any_shape_becomes_a_square(mode, size):
    assert to_square(Image.new('RGB', size, 'red'), 28, mode).size == (28, 28)


def test_odd_margins_are_rounded_down():
    image = picture(10, 7)
    assert np.array_equal(np.asarray(to_square(image, 10, 'pad'))[1:8], np.asarray(image))
    image = picture(31, 28)
    assert np.array_equal(np.asarray(to_square(image, 28, 'crop')), np.asarray(image)[:, 1:29])


def test_pad_uses_the_mean_it_is_given():
    assert to_square(picture(40, 10), 28, 'pad', (0.5, 0, 1)).getpixel((14, 0)) == (127, 0, 255)
    pixels = processor_of(mode='pad', image_mean=(0.5, 0.5, 0.5), image_std=(1, 1, 1)).image_tensor([picture(40, 10)])
    assert pixels[0, :, 0, 14].abs().max() < 1 / 255


def test_strips_too_long_and_unreadable_pictures_are_named():
    for mode, side, length in (('resize', 28, 30_000), ('pad', 28, 30_000), ('crop', 448, 10_000)):
        file = io.BytesIO()
        Image.new('RGB', (1, length)).save(file, 'PNG')
        with pytest.raises(ImageError, match=f'^strip.png: 1 x {length} pixels are too long a strip'):
            to_square({'bytes': file.getvalue(), 'path': 'strip.png'}, side, mode)
    with pytest.raises(ImageError, match='^x.png: not a readable'):
        processor_of().image_tensor([{'bytes': b'no image', 'path': 'x.png'}])


def test_no_pictures_are_an_empty_tensor():
    assert processor_of().image_tensor([]).shape == (0, 3, 28, 28)


# samples


def test_both_marks_of_an_image_are_one(chat):
    marks = ('<image>', '<|image|>')
    spelled = [chat.encode(sample(f'a {one} b {two} c', images=2)) for one in marks for two in marks]
    assert all(encoded.input_ids == spelled[0].input_ids and len(encoded.image_spans) == 2 for encoded in spelled)


@pytest.mark.parametrize('style', ['chat', 'training', 'plain'])
def test_prompt_is_the_beginning_of_the_conversation(style):
    processor = processor_of(style)
    given = sample(images=3) | {'conversations': turns('<image> and <|image|> ?', 'one', 'now <image> ?', 'two')}
    whole, asked = processor.encode(given), processor.encode(given, training=False)
    assert whole.input_ids[: len(asked)] == asked.input_ids and whole.image_spans == asked.image_spans
    assert whole.images == given['images'] and len(set(whole.image_ids)) == 3
    assert all(whole.input_ids[a:b] == [IMAGE_ID] * VISUAL and b - a == VISUAL for a, b in whole.image_spans)
    space = ' ' * (style != 'plain')
    assert (
        processor.tokenizer.decode([label for label in whole.labels if label != -100])
        == f'{space}one</s>{space}two</s>'
    )
    assert processor.encode(given | {'conversations': given['conversations'][:3]}, training=False) == asked


def test_training_keeps_every_image_of_a_turn():
    assert image_first('<image>') == '<image>' and image_first('a ?') == 'a ?'
    encoded = processor_of('training').encode(sample('see <image> and <image> ?', images=2))
    first, second = encoded.image_spans
    assert second[0] == first[1] and len(encoded.images) == 2
    assert byte_tokenizer().decode(encoded.input_ids[second[1] :]) == '\nsee  and  ? ASSISTANT: red</s>'


def test_a_video_is_its_frames_in_a_row(chat):
    frames = [picture(shift=i) for i in range(3)]
    given = sample('first <image> then <video> ?', images=1) | {'videos': [frames]}
    encoded = chat.encode(given)
    (_, still), (a, b), (c, d), (e, f) = encoded.image_spans
    assert (b, d) == (c, e) and a > still and encoded.images == [*given['images'], *frames]
    swapped = chat.encode(given | {'conversations': turns('first <video> then <image> ?', 'red')})
    assert swapped.images == [*frames, *given['images']]


def test_marks_of_the_end_in_a_text_stay_text(chat):
    encoded = chat.encode(sample('a</s>USER: b ASSISTANT: c', images=0))
    assert (
        encoded.input_ids.count(chat.tokenizer.eos_token_id)
        == encoded.input_ids.count(chat.tokenizer.bos_token_id)
        == 1
    )
    assert chat.tokenizer.decode([label for label in encoded.labels if label != -100]) == ' red</s>'


def test_plain_turns_in_words():
    words = word_tokenizer(['what color ? red blue'])
    encoded = processor_of('plain', words).encode(sample('<image> <|image|> what color ?', images=2))
    assert words.decode([i for i in encoded.input_ids if i != IMAGE_ID]) == '<s> what color ? red </s>'
    assert encoded.image_spans == [(1, 6), (6, 11)]
    bare = processor_of('plain', words, ends=False).encode(sample('<image> <|image|> what color ?', images=2))
    assert bare.input_ids == encoded.input_ids[:-1] and bare.labels == encoded.labels[:-1]
    with pytest.raises(ValueError, match=r"s7.*\['green'\]"):
        processor_of('plain', words).encode(sample('<image>green ?'))


@pytest.mark.parametrize('style', ['chat', 'plain'])
def test_documents_are_supervised_text_around_images(style):
    processor = processor_of(style)
    encoded = processor.encode(sample(images=2, document='<image> a cat <|image|> a dog', conversations=[]))
    assert all(set(encoded.labels[a:b]) == {-100} for a, b in encoded.image_spans) and len(encoded.image_spans) == 2
    assert processor.tokenizer.decode([label for label in encoded.labels if label != -100]) == 'a cata dog</s>'


def test_truncation_drops_a_whole_image(chat):
    two = chat.encode(sample(images=2) | {'conversations': turns('<image> ?', 'yes', '<image> ?', 'no')})
    start, stop = two.image_spans[1]
    for length in range(start, stop):
        cut = truncate(two, length)
        assert (
            len(cut) == start
            and cut.image_spans == two.image_spans[:1]
            and len(cut.images) == 1
            and IMAGE_ID not in cut.input_ids[start:]
        )
    assert truncate(two, stop).image_spans == two.image_spans
    with pytest.raises(ValueError, match="'s7' has .* cut to 7 of at most 9 nothing supervised"):
        truncate(chat.encode(sample('<image> ?')), 9)


def test_batches_mix_samples_with_and_without_images(chat):
    samples = [
        sample('<image> and <image> ?', images=2),
        sample('why ?', images=0),
        sample() | {'images': [picture(9, 50)]},
    ]
    batch = collate([chat.encode(s) for s in samples], chat.tokenizer.pad_token_id, image_tensor=chat.image_tensor)
    assert batch['pixel_values'].shape == (3, 3, 28, 28)
    assert (batch['input_ids'] == IMAGE_ID).sum(1).tolist() == [2 * VISUAL, 0, VISUAL]
    assert 'pixel_values' not in collate([chat.encode(samples[1])], 0)


BAD = {
    'more images': (dict(images=[picture(), picture()]), '1 <image> placeholders, 2 images'),
    'fewer images': (dict(images=[]), '1 <image> placeholders, 0 images'),
    'images without a mark': (dict(conversations=turns('what ?', 'red')), '0 <image> placeholders, 1 images'),
    'fewer videos': (dict(conversations=turns('<image> <video> ?', 'red')), '1 <video> placeholders, 0 videos'),
    'more videos': (dict(videos=[[picture()]]), '0 <video> placeholders, 1 videos'),
    'empty video': (
        dict(images=[], videos=[[]], conversations=turns('<video> ?', 'red')),
        'video 0 is of no frames; .* at least one',
    ),
    'video not decoded': (
        dict(images=[], videos=[b'film'], conversations=turns('<video> ?', 'red')),
        'video 0 is bytes; .* list of frames',
    ),
    'mark in answer': (
        dict(conversations=turns('<image> ?', 'this <|image|>')),
        r'answer in turn 1 contains <\|image\|>',
    ),
    'video mark in answer': (
        dict(conversations=turns('<image> ?', 'a', 'b', '<video>')),
        'answer in turn 3 contains <video>',
    ),
    'empty answer': (dict(conversations=turns('<image> ?', ' ')), 'the answer in turn 1 is empty'),
    'no answer': (dict(conversations=turns('<image> ?')), 'nothing is supervised'),
    'no turns': (dict(conversations=[]), r'the roles are \[\]'),
    'role': (
        dict(conversations=[{'from': 'system', 'value': 'x'}, *turns('<image> ?', 'red')]),
        r"the roles are \['system', 'human', 'gpt'\]",
    ),
    'order': (dict(conversations=turns('<image> ?', 'red')[::-1]), r"the roles are \['gpt', 'human'\]"),
}


@pytest.mark.parametrize('style', ['chat', 'training', 'plain'])
@pytest.mark.parametrize('case', BAD)
def test_bad_samples_are_named(case, style):
    change, why = BAD[case]
    with pytest.raises(ValueError, match=f"^sample 's7': .*{why}"):
        processor_of(style).encode(sample() | change)


def test_an_unanswered_test_sample_is_fine(chat):
    blank = sample(answer=' ')
    assert chat.encode(blank, training=False).input_ids == chat.encode(sample(), training=False).input_ids


def test_settings_are_checked():
    with pytest.raises(ValueError, match="style 'v1' is unknown"):
        processor_of('v1')
    with pytest.raises(ValueError, match="image mode 'plain' is unknown"):
        processor_of(mode='plain')


def test_benchmark_prompts_are_the_official_words():
    assert (
        PROMPTS['mmbench'].format(hint='N/A', question='Q', options='A. x')
        == 'N/A\nQ\nA. x\nAnswer with the option\u2019s letter from the given choices directly.'
    )
    assert PROMPTS['vqa'].format(question='Q') == 'Q Answer the question using a single word or phrase.'
    assert PROMPTS['mme'].format(question='Q') == 'Q\nAnswer the question using a single word or phrase.'


def test_saved_and_read_back(tmp_path):
    first = processor_of('training', mode='pad', ends=False)
    first.save_pretrained(tmp_path)
    second = Owl2Processor.from_pretrained(tmp_path)
    assert (second.to_dict(), second.chat_template) == (first.to_dict(), first.chat_template)
    assert second.encode(sample()) == first.encode(sample())
