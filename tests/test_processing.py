"A processor as transformers has them: calls, templates, tokens, folders, for all five papers."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import Regex
from toys import model_of
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast, ProcessorMixin

from mllm_replica.core.registry import PAPERS
from mllm_replica.data.images import ImageError
from mllm_replica.data.language import byte_tokenizer, word_tokenizer
from mllm_replica.eagle.prompts import EagleImageProcessor, EagleProcessor
from mllm_replica.honeybee.model import HoneybeeProcessor
from mllm_replica.honeybee.prompts import SYSTEM
from mllm_replica.mm1.model import MM1Processor
from mllm_replica.models.image_processing import VisionLanguageImageProcessor
from mllm_replica.models.templates import with_token
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.models.vlm import VisionLanguageProcessor
from mllm_replica.owl2.processor import Owl2ImageProcessor, Owl2Processor
from mllm_replica.owl3.processor import Owl3ImageProcessor, Owl3Processor

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / 'golden'
CHATML = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')
KINDS = dict(honeybee=HoneybeeProcessor, owl2=Owl2Processor, mm1=MM1Processor, eagle=EagleProcessor, owl3=Owl3Processor)


def golden(path, key):
    return json.loads((GOLDEN / path).read_text())[key]


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in CHATML])
    return tokenizer


def picture(colour='red', size=(20, 12)):
    return Image.new('RGB', size, colour)


def messages(*texts):
    return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(texts)]


def sample_of(*texts, **media):
    turns = [{'from': ('human', 'gpt')[i % 2], 'value': text} for i, text in enumerate(texts)]
    return dict(id='s', conversations=turns) | media


def asked(question='What is it?', marks=1):
    content = [{'type': 'image'}] * marks + [{'type': 'text', 'text': question}]
    return [{'role': 'user', 'content': content}]


@pytest.fixture(params=PAPERS, scope='module')
def pair(request):
    model = model_of(request.param)
    tokenizer = chat_tokenizer() if request.param == 'owl3' else byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    settings = dict(placeholder='9:') if request.param == 'owl3' else {}  # the ids that the toy model knows
    return model, KINDS[request.param].from_config(model.config, tokenizer, **settings)


# calls


def test_it_is_a_processor_of_transformers(pair):
    _, processor = pair
    assert isinstance(processor, ProcessorMixin) and processor.chat_template
    assert {'input_ids', 'attention_mask', 'pixel_values'} <= set(processor.model_input_names)


def test_a_call_gives_what_the_model_reads(pair):
    model, processor = pair
    texts = [processor.apply_chat_template(asked(q), add_generation_prompt=True) for q in ('What is it?', 'Why?')]
    batch = processor(images=[picture('red'), picture('blue')], text=texts, padding=True, return_tensors='pt')
    assert {'input_ids', 'attention_mask', 'pixel_values'} == set(batch)
    assert batch['input_ids'].shape == batch['attention_mask'].shape and len(batch['pixel_values']) == 2
    assert batch['input_ids'].min() >= 0
    with torch.no_grad():
        together = model(**batch).logits
        for row, (text, colour) in enumerate(zip(texts, ('red', 'blue'))):
            one = processor(picture(colour), text, return_tensors='pt')
            torch.testing.assert_close(
                together[row, batch['attention_mask'][row].bool()], model(**one).logits[0], rtol=1e-4, atol=1e-5
            )
    answers = processor.batch_decode(model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_one_call_from_messages_to_tensors(pair):
    _, processor = pair
    said = [{'role': 'user', 'content': [{'type': 'image', 'image': picture()}, {'type': 'text', 'text': 'Why?'}]}]
    written = processor.apply_chat_template(said, add_generation_prompt=True)
    at_once = processor.apply_chat_template(
        said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt'
    )
    apart = processor(picture(), written, return_tensors='pt')
    assert torch.equal(at_once['input_ids'], apart['input_ids'])
    assert torch.equal(at_once['pixel_values'], apart['pixel_values'])


def test_a_call_and_a_sample_give_the_same_ids(pair):
    _, processor = pair
    written = processor.apply_chat_template(asked('\nWhat is it?'), add_generation_prompt=True)
    encoded = processor.encode(sample_of('<image>\nWhat is it?', images=[picture()]), training=False)
    batch = processor(picture(), written, return_tensors='pt')
    assert batch['input_ids'].tolist() == [encoded.input_ids]
    assert torch.equal(batch['pixel_values'], processor.image_tensor(encoded.images))


def test_text_alone_and_images_alone(pair):
    _, processor = pair
    assert set(processor(text='Hello')) == {'input_ids', 'attention_mask'}
    assert set(processor(images=[picture()] * 2, return_tensors='pt')) == {'pixel_values'}
    with pytest.raises(ValueError, match='reads text, images and videos'):
        processor()


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_and_truncation_as_asked(pair, side):
    _, processor = pair
    out = processor(text=['Hello', 'Hi'], padding='max_length', max_length=12, padding_side=side, return_tensors='pt')
    assert out['input_ids'].shape == (2, 12)
    ends = out['attention_mask'][:, 0 if side == 'left' else -1].tolist()
    assert ends == [0, 0] and out['attention_mask'].sum(1).unique().numel() == 2
    cut = processor(text='A long question', truncation=True, max_length=4)['input_ids'][0]
    assert cut == processor(text='A long question')['input_ids'][0][:4]
    assert processor(text=['Hello', 'Hi'], padding=True, pad_to_multiple_of=8, return_tensors='np')['input_ids'].shape[
        1
    ] in (8, 16)


def test_an_image_is_never_cut(pair):
    _, processor = pair
    written = processor.apply_chat_template(asked(), add_generation_prompt=True)
    with pytest.raises(ValueError, match='text 0: max_length=.* cuts an image'):
        processor(picture(), written, truncation=True, max_length=2)


def test_pictures_in_every_form(pair, tmp_path):
    _, processor = pair
    picture().save(tmp_path / 'red.png')
    array = np.asarray(picture())
    forms = [
        picture(),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        array.astype(np.float32) / 255,
        (tmp_path / 'red.png').read_bytes(),
        'red.png',
    ]
    written = processor.apply_chat_template(asked(), add_generation_prompt=True)
    pixels = [processor(form, written, return_tensors='pt', root=tmp_path)['pixel_values'] for form in forms]
    assert all(torch.equal(found, pixels[0]) for found in pixels)
    several = processor(np.stack([array, array]), [written] * 2, return_tensors='pt', padding=True)['pixel_values']
    assert torch.equal(several, torch.cat([pixels[0]] * 2))
    with pytest.raises(ImageError, match='pass root='):
        processor('red.png', written)
    with pytest.raises(ImageError, match='outside'):
        processor('../red.png', written, root=tmp_path)
    with pytest.raises(ImageError, match='does not exist'):
        processor('https://host/red.png', written, root=tmp_path)


def test_images_are_dealt_out_by_the_placeholders(pair):
    _, processor = pair
    one, two = (processor.apply_chat_template(asked(marks=n), add_generation_prompt=True) for n in (1, 2))
    flat = [picture('red'), picture('blue'), picture('green')]
    a = processor(flat, [two, one], padding=True, return_tensors='pt')
    b = processor([flat[:2], flat[2:]], [two, one], padding=True, return_tensors='pt')
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match='text 0: 2 <image> placeholders, 1 images'):
        processor([flat[:1], flat[1:]], [two, one])
    with pytest.raises(ValueError, match=r'\[2, 1\] <image> placeholders in the texts, 2 images given'):
        processor(flat[:2], [two, one])
    with pytest.raises(ValueError, match='images of 1 texts were given, but 2 texts'):
        processor([flat], [two, one])


def test_special_tokens_in_a_sample_are_text_and_in_a_prompt_tokens(pair):
    _, processor = pair
    end = processor.tokenizer.eos_token
    asking = sample_of(f'Say {end} please')
    assert processor.tokenizer.eos_token_id not in processor.encode(asking, training=False).input_ids
    if not isinstance(processor, HoneybeeProcessor):  # there the end of an answer is not written
        assert processor.tokenizer.eos_token_id in processor(text=f'yes{end}')['input_ids'][0]


# the image token


@pytest.mark.parametrize('paper', [paper for paper in PAPERS if paper != 'owl3'])
def test_the_image_token_is_a_token(paper):
    model, tokenizer = model_of(paper), byte_tokenizer()
    processor = KINDS[paper].from_config(model.config, tokenizer)
    number = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert number == processor.image_token_id == model.config.image_token_id >= 0
    assert len(tokenizer) == 259 and processor.tokenizer.decode([number]) == processor.image_token
    assert processor.tokenizer.decode([number, 68], skip_special_tokens=True) == 'A'
    model.resize_token_embeddings(len(processor.tokenizer))
    assert model.get_output_embeddings().weight.shape[0] == number + 1


def test_numbers_between_words_and_rows_are_reserved():
    config = VisionLanguageConfig(text_config=dict(vocab_size=300))
    processor = VisionLanguageProcessor.from_config(config, byte_tokenizer())
    assert len(processor.tokenizer) == 301
    assert processor.tokenizer.convert_ids_to_tokens([259, 299, 300]) == ['<reserved_259>', '<reserved_299>', '<image>']


@pytest.mark.parametrize('number', [5, 300])
def test_a_token_elsewhere_is_refused(number):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken('<image>', special=True)])
    with pytest.raises(ValueError, match=f'<image> is number 259 in the tokenizer and {number}'):
        with_token(tokenizer, '<image>', number)


def test_another_token_may_stand_for_images_unless_a_text_says_it():
    config = VisionLanguageConfig(text_config=dict(vocab_size=259), image_token_id=3 + ord('z'))
    processor = VisionLanguageProcessor.from_config(config, byte_tokenizer())
    sample = sample_of('<image> why?', 'so', images=[picture()])
    assert processor.encode(sample).input_ids.count(3 + ord('z')) == processor.visual_tokens
    with pytest.raises(ValueError, match="sample 's': its text has token number 125, which stands for images"):
        processor.encode(sample_of('<image> lazy?', 'so', images=[picture()]))


def test_a_known_token_is_used_as_it_is():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken('<image>', special=True)])
    config = VisionLanguageConfig(text_config=dict(vocab_size=320), image_token_id=259)
    assert VisionLanguageProcessor.from_config(config, tokenizer).tokenizer is tokenizer


# folders


def test_a_folder_keeps_everything(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for again in (AutoProcessor.from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)):
        assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
        written = again.apply_chat_template(asked(), add_generation_prompt=True)
        assert written == processor.apply_chat_template(asked(), add_generation_prompt=True)
        assert again(picture(), written)['input_ids'] == processor(picture(), written)['input_ids']
    reader = AutoImageProcessor.from_pretrained(tmp_path)
    assert reader.to_dict() == processor.image_processor.to_dict()
    assert (tmp_path / 'chat_template.jinja').is_file()


# templates


@pytest.mark.parametrize('case', golden('owl2/prompts_and_labels.json', 'prompts'), ids=str)
def test_official_prompts_of_owl2(case):
    style = {'mplug_owl2': 'chat', 'v1': 'training'}[case['template']]
    processor = Owl2Processor(Owl2ImageProcessor(28), byte_tokenizer(), 5, style=style)
    said = [text for text in case['turns'] if text is not None]
    written = processor.apply_chat_template(messages(*said), add_generation_prompt=None in case['turns'])
    assert written == case['prompt']
    parts = [
        [p for text in turn.split('<|image|>') for p in ({'type': 'image'}, {'type': 'text', 'text': text})][1:]
        for turn in said
    ]
    assert processor.apply_chat_template(messages(*parts), add_generation_prompt=None in case['turns']) == written


def eagle_tokenizer(begin):
    "The toy tokenizer of the golden file: one id per character, special tokens apart."
    vocabulary = golden('eagle/prompts_labels.json', 'vocabulary')
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token='<unk>'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex('.|\n'), 'isolated'), decoders.Fuse()
    tokenizer.add_special_tokens([token for token in vocabulary if len(token) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=vocabulary[begin] if begin else '<s>',
        eos_token='</s>',
        unk_token='<unk>',
        pad_token='<unk>',
    )


@pytest.mark.parametrize('case', golden('eagle/prompts_labels.json', 'cases'), ids=lambda case: case['name'])
def test_official_prompts_of_eagle(case):
    tokenizer = eagle_tokenizer(case['add_bos'])
    processor = EagleProcessor(EagleImageProcessor(28), tokenizer, 1, template=case['template'])
    turns = case['after_multimodal_preprocess']  # with the image's mark, which a message brings
    said = messages(*(turn['value'] for turn in turns))
    written = processor.apply_chat_template(said)
    if case['prompt'] is not None:
        assert written == case['prompt']
    assert (
        processor.apply_chat_template(messages('<image>\nQ?'), add_generation_prompt=True) == case['inference_prompt']
    )
    ids = processor([picture()] * case['has_image'] or None, written)['input_ids'][0]
    assert [-200 if i == processor.image_token_id else i for i in ids] == case['input_ids']
    at_once = processor.apply_chat_template(
        said, tokenize=True, processor_kwargs=dict(images=[picture()] * case['has_image'])
    )
    assert at_once == [ids]


@pytest.mark.parametrize('case', golden('owl3/processor_text.json', 'cases'), ids=lambda case: case['name'])
def test_official_prompts_of_owl3(case):
    processor = Owl3Processor(
        Owl3ImageProcessor(golden('owl3/processor_text.json', 'image_size')),
        chat_tokenizer(),
        cropping=case['cut_enable'],
    )
    said = case['messages'][: -1 if case['inference_mode'] else None]
    written = processor.apply_chat_template(said, add_generation_prompt=case['inference_mode'])
    images = [picture(size=(width, height)) for height, width in case['image_sizes_hw']] or None
    videos = [[picture()] * count for count in case['video_frames']] or None
    out = processor(images, written, videos=videos, return_tensors='pt')
    assert [i - 3 for i in out['input_ids'][0].tolist()] == case['input_ids']
    assert processor.tokenizer.decode(out['input_ids'][0]) == case['text']
    assert len(out.get('pixel_values', ())) == case['num_pixel_images']


TEMPLATES = [case for case in golden('honeybee/text_golden.json', 'templates') if case['text'].startswith(SYSTEM)]
ENCODED = [c for c in golden('honeybee/text_golden.json', 'encode') if not c['max_length'] and not c['no_eos']]


@pytest.mark.parametrize('case', TEMPLATES, ids=lambda case: case['dataset'])
def test_official_prompts_of_honeybee(case):
    processor = HoneybeeProcessor(VisionLanguageImageProcessor(16), byte_tokenizer(), 4)
    lines = case['text'].removeprefix(SYSTEM).replace('\nHuman: <image>\nHuman: ', '\nHuman: <image>\n')
    turns = [text for pair in lines.split('\nHuman: ')[1:] for text in pair.split('\nAI: ')]
    said = [{'role': 'system', 'content': SYSTEM}, *messages(*turns)]
    assert processor.apply_chat_template(said) == case['text']


@pytest.mark.parametrize('case', ENCODED, ids=lambda case: case['prompt'][-30:])
def test_official_ids_of_honeybee(case):
    processor = HoneybeeProcessor(VisionLanguageImageProcessor(16), byte_tokenizer(), case['num_visual_tokens'])
    images = [picture()] * case['prompt'].count('<image>')
    ids = processor(images or None, case['prompt'])['input_ids'][0]
    assert [-1 if i == processor.image_token_id else i for i in ids] == case['input_ids']


def test_what_eagle_says_before_the_first_question_is_dropped():
    processor = EagleProcessor(EagleImageProcessor(28), byte_tokenizer(), 1)
    said = messages('What?', 'red')
    late = [{'role': 'assistant', 'content': 'Welcome.'}, *said]
    assert processor.apply_chat_template(late) == processor.apply_chat_template(said)


def test_unknown_roles_and_contents_are_refused():
    processor = Owl2Processor(Owl2ImageProcessor(28), byte_tokenizer(), 5)
    with pytest.raises(Exception, match='a message of role tool'):
        processor.apply_chat_template([{'role': 'tool', 'content': 'x'}])
    with pytest.raises(Exception, match='content of type audio'):
        processor.apply_chat_template([{'role': 'user', 'content': [{'type': 'audio'}]}])


def test_plain_styles_in_words():
    words, said = word_tokenizer(['what color ? red blue']), messages('<image> what color ?', 'red', 'what ?')
    for kind, reader, settings in (
        (HoneybeeProcessor, VisionLanguageImageProcessor, dict(style='plain')),
        (Owl2Processor, Owl2ImageProcessor, dict(style='plain')),
        (EagleProcessor, EagleImageProcessor, dict(template='words')),
    ):
        processor = kind(reader(8), words, 2, **settings)
        written = processor.apply_chat_template(said, add_generation_prompt=True)
        sample = sample_of('<image> what color ?', 'red', 'what ?', images=[picture()])
        assert processor(picture(), written)['input_ids'] == [processor.encode(sample, training=False).input_ids]


# videos


@pytest.mark.parametrize('kind', [Owl2Processor, Owl3Processor])
def test_videos_are_lists_of_frames(kind):
    reader = Owl2ImageProcessor(28) if kind is Owl2Processor else Owl3ImageProcessor(28)
    processor = kind(reader, byte_tokenizer(), 5) if kind is Owl2Processor else kind(reader, chat_tokenizer())
    frames = [picture('red'), picture('blue'), picture('green')]
    said = [{'role': 'user', 'content': [{'type': 'video'}, {'type': 'text', 'text': 'What moves?'}]}]
    written = processor.apply_chat_template(said, add_generation_prompt=True)
    out = processor(text=written, videos=frames, return_tensors='pt')
    encoded = processor.encode(sample_of('<video>What moves?', videos=[frames]), training=False)
    assert out['input_ids'].tolist() == [encoded.input_ids] and out['pixel_values'].shape == (3, 3, 28, 28)
    arrays = np.stack([np.asarray(frame) for frame in frames])
    assert torch.equal(processor(text=written, videos=arrays, return_tensors='pt')['pixel_values'], out['pixel_values'])


def test_a_video_that_cannot_be_read_is_refused():
    processor = HoneybeeProcessor(VisionLanguageImageProcessor(16), byte_tokenizer(), 4)
    with pytest.raises(ValueError, match='reads no videos'):
        processor(text='<video>What?', videos=[[picture()]])
