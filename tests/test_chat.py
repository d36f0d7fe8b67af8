"A conversation with a saved model: what is said, what is refused, and the pictures that explain an answer."

import json, os, pty, select, shutil, signal, subprocess, sys, time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from toys import TEXT, model_of
from typer.testing import CliRunner
from variants import VARIANTS, variant

from mllm_replica.cli import app
from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import Trouble
from mllm_replica.data.images import ImageError, encode_png
from mllm_replica.data.language import byte_tokenizer, text_ids
from mllm_replica.demo import chatting
from mllm_replica.demo.chatting import Chat, Conversation
from mllm_replica.models.looking import attention_rows, by_word, eager, inputs_of, per_picture, shares, words_of

ROOT = Path(__file__).resolve().parent.parent


def some(papers, fast):
    "Parameters of which `make test` takes the fast ones."
    return [name if name in fast else pytest.param(name, marks=pytest.mark.nightly) for name in papers]


def processor_for(model):
    "Bytes as tokens."
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind, paper = PROCESSOR_MAPPING[type(model.config)], model.config.model_type
    more = {'eagle': dict(template='words'), 'owl3': dict(style='plain', ends=False, placeholder='<|')}
    return kind.from_config(model.config, byte_tokenizer(), **more.get(paper, {}))


def seeing(model):
    "The model, its placeholder what the byte tokenizer makes of it."
    if model.config.model_type == 'owl3':
        model.config.placeholder_ids = list(text_ids(byte_tokenizer(), '<|'))
    return model


@cache
def chat_of(paper):
    model = seeing(model_of(paper))
    return Chat(model, processor_for(model), 12)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Paper -> its toy, saved as any model is."
    made = tmp_path_factory.mktemp('saved')

    def save(paper):
        if not (made / paper).exists():
            chat = chat_of(paper)
            chat.model.save_pretrained(made / paper)
            chat.processor.save_pretrained(made / paper)
        return made / paper

    return save


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Pictures, and what is none."
    place = tmp_path_factory.mktemp('files')
    for name in ('red', 'blue'):
        Image.new('RGB', (40, 30), name).save(place / f'{name}.png')
    whole = (place / 'red.png').read_bytes()
    (place / 'half.png').write_bytes(whole[: len(whole) // 2])
    (place / 'half.mp4').write_bytes(whole)
    (place / 'words.jpg').write_text('no picture')
    return place


def run(*words, input=None):
    return CliRunner().invoke(app, ['chat', *map(str, words)], input=input)


def once(chat, talk, text):
    "Cost and texts of one question."
    cost, *texts = chat.answer(talk, text)
    return cost, texts


class Parrot:
    "A model that says what it is told to, one byte at a time."

    def __init__(self, answer, seconds=0.0):
        self.ids, self.seconds, self.config = (
            text_ids(byte_tokenizer(), answer),
            seconds,
            chat_of('honeybee').model.config,
        )
        self.generation_config, self.device, self.dtype = (
            chat_of('honeybee').model.generation_config,
            'cpu',
            torch.float32,
        )

    def generate(self, input_ids, streamer, stopping_criteria, **given):
        streamer.put(input_ids)
        for i in self.ids:
            time.sleep(self.seconds)
            streamer.put(torch.tensor([i]))
            if stopping_criteria(input_ids, None).all():
                break
        streamer.end()


# --- what is said ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('paper', some(PAPERS, ('mm1', 'owl3')))
def test_a_streamed_answer_is_the_answer(paper):
    chat, talk = chat_of(paper), Conversation(waiting=[Image.new('RGB', (40, 30), c) for c in ('red', 'blue')])
    cost, texts = once(chat, talk, 'which?')
    prompt = talk.said.prompt
    pixels = chat.processor.image_tensor(prompt.images)
    out = chat.model.generate(
        input_ids=torch.tensor([prompt.input_ids]), pixel_values=pixels, max_new_tokens=12, do_sample=False
    )
    assert texts[-1] == chat.processor.decode(out[0, len(prompt) :]).strip()
    assert len(texts) > 3 and texts[0] != texts[-1], 'it is shown while it is written'
    assert cost.pictures == 2 and cost.positions == len(prompt)
    visual = len(chat.model.get_image_features(pixels).pooler_output.flatten(0, 1))
    assert cost.visual == visual, 'as many as the connector gives'


@pytest.mark.parametrize(
    'paper', some([paper for paper in PAPERS if paper != 'honeybee'], ('owl2',))
)  # its template fills a toy's context
def test_a_conversation_keeps_what_was_said_and_shown(paper, folder, files):
    spoken = [
        'what is it',
        f'/image {files}/half.png',
        f'/image {files}/red.png',
        'and this',
        '',
        'once more',
        '/new',
        'what is it',
    ]
    found = run(folder(paper), '--image', f'{files}/blue.png', '--max-new-tokens', 6, input='\n'.join(spoken) + '\n')
    assert found.exception is None
    costs = [line for line in found.stderr.splitlines() if line.startswith('[')]
    assert [line[1] for line in costs] == ['1', '2', '2', '0']
    assert found.stderr.count('\nError: ') == 1 and 'half.png: damaged or truncated' in found.stderr
    talk, chat = Conversation(), chat_of(paper)
    for path, text in (('blue', 'what is it'), ('red', 'and this'), (None, 'once more')):
        if path:
            talk.take(files / f'{path}.png', chat.processor)
        assert once(Chat(chat.model, chat.processor, 6), talk, text)[1][-1] in found.stdout


@pytest.mark.parametrize('paper', some(PAPERS, ('eagle',)))
def test_one_question_of_a_script(paper, folder, files, tmp_path):
    found = run(folder(paper), '--image', files / 'red.png', '--prompt', 'what?', '--picture', tmp_path / 'why.png')
    assert found.exit_code == 0, found.output
    assert found.stderr.splitlines()[0].startswith('[1 picture, ') and found.stdout.strip()
    assert Image.open(tmp_path / 'why.png').width > 400


def test_a_character_of_several_bytes_appears_when_it_is_whole():
    chat, talk = Chat(Parrot('ab ü€'), chat_of('honeybee').processor), Conversation()
    assert once(chat, talk, 'go')[1] == ['a', 'ab', 'ab', 'ab', 'ab ü', 'ab ü', 'ab ü', 'ab ü€', 'ab ü€']


def test_what_a_processor_cuts_off_is_not_waited_for():
    model = Parrot('blue\n<image> gold')
    chat, talk = Chat(model, chat_of('mm1').processor), Conversation()
    assert once(chat, talk, 'go')[1][-1] == 'blue'
    assert len(talk.said.answer) < len(model.ids)


def test_an_answer_holds_no_picture():
    chat, talk = Chat(Parrot('see <image> it'), chat_of('honeybee').processor), Conversation()
    once(chat, talk, 'go')
    assert talk.turns[-1]['value'] == 'see  it'
    once(chat, talk, 'again')
    assert len(talk.turns) == 4


# --- stopping -------------------------------------------------------------------------------------------------------------
def test_a_stopped_answer_stays_as_far_as_it_came():
    chat, talk = Chat(Parrot('a' * 200, 0.01), chat_of('honeybee').processor), Conversation()
    answer = chat.answer(talk, 'go')
    next(answer), next(answer)
    talk.stopped = True
    assert 0 < len(list(answer)[-1]) < 100 and talk.turns[-1]['value'] == 'a' * len(talk.said.answer)


def test_leaving_stops_the_model():
    chat, talk = Chat(Parrot('a' * 200, 0.01), chat_of('honeybee').processor), Conversation()
    answer = chat.answer(talk, 'go')
    next(answer), next(answer)
    start = time.monotonic()
    answer.close()
    assert time.monotonic() - start < 1 and 0 < len(talk.said.answer) < 100


def test_control_c_stops_the_answer_and_not_the_program(monkeypatch, folder):
    class Interrupted(Chat):
        def answer(self, talk, text):
            for i, said in enumerate(super().answer(talk, text)):
                yield said
                if i == 2 and text == 'first':
                    raise KeyboardInterrupt

    monkeypatch.setattr(chatting, 'Chat', Interrupted)
    found = run(folder('owl2'), input='first\nsecond\n')
    assert found.exit_code == 0 and ' [stopped]' in found.stderr
    assert found.stderr.count(' positions]') == 2


@pytest.mark.nightly
def test_control_c_of_a_terminal(folder, tmp_path):
    endless = tmp_path / 'endless'
    shutil.copytree(folder('owl2'), endless)
    config = json.loads((endless / 'config.json').read_text())
    config['text_config']['max_position_embeddings'] = 100_000
    (endless / 'config.json').write_text(json.dumps(config))
    here, there = pty.openpty()
    command = [
        sys.executable,
        '-c',
        'from mllm_replica.cli import app; app()',
        'chat',
        endless,
        '--max-new-tokens',
        '90000',
    ]
    child = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, start_new_session=True, cwd=ROOT)

    seen = ''

    def read_until(text, seconds=60):
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen and time.monotonic() < end:
            if select.select([here], [], [], 1)[0]:
                seen += os.read(here, 4096).decode(errors='replace')
        assert text in seen, seen
        seen = seen.partition(text)[2]

    try:
        read_until('> ')
        os.write(here, b'go on\n')
        read_until('positions]')
        child.send_signal(signal.SIGINT)
        read_until('[stopped]')
        read_until('> ')
        time.sleep(1)  # a signal in front of the waiting is noticed with the next key only
        child.send_signal(signal.SIGINT)
        read_until('> ')
        os.write(here, b'/quit\n')
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(here)
        os.close(there)


# --- what is refused ------------------------------------------------------------------------------------------------------
def test_what_is_no_model_is_told_in_a_line(folder, tmp_path):
    def broken(name, change):
        place = tmp_path / name
        shutil.copytree(folder('owl2'), place)
        change(place)
        return place

    cases = {
        'no config.json': tmp_path / 'nowhere',
        'cannot be loaded': broken('cut', lambda f: (f / 'model.safetensors').write_bytes(b'\0' * 100)),
        'no file named': broken('bare', lambda f: (f / 'model.safetensors').unlink()),
        'config.json': broken('json', lambda f: (f / 'config.json').write_text('{"model_type": ')),
        'tokenizer': broken('mute', lambda f: [p.unlink() for p in f.glob('*token*')]),
    }
    for said, place in cases.items():
        found = run(place, '--prompt', 'what?')
        assert found.exit_code == 1 and said in found.stderr, (said, found.output)
        assert found.stderr.startswith('Error: ') and found.stderr.count('\n') == 1, found.stderr


def test_a_model_of_no_paper_is_told(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(Trouble):
        chatting.load(tmp_path)


def test_files_that_are_no_pictures_are_told_in_a_line(folder, files, monkeypatch):
    cases = {
        'none.png': 'there is no such file',
        'half.png': 'damaged or truncated',
        'words.jpg': 'not a readable PNG',
        'half.mp4': 'not a video that can be decoded',
        '.': 'there is no such file',
    }
    pytest.importorskip('av')
    for name, said in cases.items():
        kind = '--video' if name.endswith('mp4') else '--image'
        found = run(folder('owl2'), kind, files / name, '--prompt', 'what?')
        assert found.exit_code == 1 and said in found.stderr and found.stderr.count('\n') == 1, found.output
    monkeypatch.setattr(chatting, 'MAX_BYTES', 10)
    with pytest.raises(ImageError, match=r'red.png: 0 MB are more than the limit'):
        chatting.read_image(files / 'red.png')


def test_a_picture_of_too_many_pixels(tmp_path):
    Image.new('1', (8000, 8000)).save(tmp_path / 'large.png')
    with pytest.raises(ImageError, match='8000 x 8000 pixels are more than the limit'):
        chatting.read_image(tmp_path / 'large.png')


def test_a_question_that_cannot_be_asked_changes_nothing():
    chat, talk = chat_of('owl2'), Conversation(waiting=[Image.new('RGB', (8, 8))])
    for text, said in (
        ('  ', 'is empty'),
        ('<image> <image>', '2 <image> placeholders, 1 images'),
        ('<video>', '1 <video> placeholders, 0 videos'),
        ('a' * 300, 'the language model has 256'),
    ):
        with pytest.raises(Trouble, match=said):
            once(chat, talk, text)
    assert talk.turns == [] and len(talk.waiting) == 1


def test_an_error_of_the_model_is_told_and_changes_nothing(monkeypatch):
    chat, talk = Chat(Parrot('abc'), chat_of('honeybee').processor), Conversation()
    monkeypatch.setattr(Parrot, 'generate', lambda *_, **__: 1 / 0)
    with pytest.raises(Trouble, match='could not answer: division by zero'):
        once(chat, talk, 'go')
    assert talk.turns == []


def test_nothing_said_is_no_answer():
    chat, talk = Chat(Parrot(' '), chat_of('honeybee').processor), Conversation(waiting=[Image.new('RGB', (8, 8))])
    with pytest.raises(Trouble, match='said nothing'):
        once(chat, talk, 'go')
    assert talk.turns == [] and len(talk.waiting) == 1


def test_an_answer_ends_with_the_context():
    chat, talk = Chat(chat_of('owl2').model, chat_of('owl2').processor, 1000), Conversation()
    once(chat, talk, 'a' * 200)
    assert len(talk.said.prompt) + len(talk.said.answer) <= 256


@pytest.mark.parametrize('paper', some(('owl2', 'mm1', 'eagle', 'owl3'), ('mm1',)))
def test_frames_of_a_video(paper, tmp_path):
    from test_owl3_processor import film

    (tmp_path / 'a.mp4').write_bytes(film())
    chat, talk = chat_of(paper), Conversation()
    talk.take(tmp_path / 'a.mp4', chat.processor)
    assert once(chat, talk, 'what?')[0].pictures == 8


# --- what explains an answer ----------------------------------------------------------------------------------------------
def talked(model):
    "A chat, and a conversation with two pictures and an answer."
    chat = Chat(model, processor_for(model), 6)
    talk = Conversation(waiting=[Image.new('RGB', (40, 30), c) for c in ('red', 'blue')])
    once(chat, talk, 'a <image> b <image> c')
    return chat, talk


def check_picture(model):
    "The picture is drawn from finite numbers; attention of the text sums to 1, and the model answers as before."
    chat, talk = talked(model)
    before = model(**inputs_of(model, chat.processor, talk.said)).logits
    figure = chat.explain(talk)
    for ax in figure.axes:
        for image in ax.images:
            assert bool(torch.tensor(image.get_array().astype('float64')).isfinite().all())
    rows = attention_rows(model, chat.processor, talk.said)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(sum(shares(rows, talk.said).values()), torch.ones(rows.shape[:2]), atol=1e-4, rtol=0)
    assert torch.equal(model(**inputs_of(model, chat.processor, talk.said)).logits, before)
    assert chat.drawn(talk)[:4] == b'\x89PNG'


@pytest.mark.parametrize('paper', some(PAPERS, ('owl3',)))
def test_the_picture_of_each_paper(paper):
    check_picture(chat_of(paper).model)


@pytest.mark.nightly
@pytest.mark.parametrize('name', VARIANTS)
def test_the_picture_of_each_kind_of_part(name):
    check_picture(seeing(variant(name)))


@pytest.mark.parametrize('paper', some(('owl2', 'honeybee', 'mm1', 'eagle'), ('owl2',)))
def test_rows_are_those_of_transformers(paper):
    model = chat_of(paper).model
    chat, talk = talked(model)
    with eager(model.language_model), torch.no_grad():
        out = model(**inputs_of(model, chat.processor, talk.said), output_attentions=True, use_cache=False)
    expected = torch.stack([layer[0].mean(0)[len(talk.said.prompt) - 1 :] for layer in out.attentions])
    torch.testing.assert_close(attention_rows(model, chat.processor, talk.said), expected)


def test_owl3_sums_to_one_over_the_images_that_a_word_sees():
    from mllm_replica.owl3.looking import image_rows

    chat, talk = talked(chat_of('owl3').model)
    rows = image_rows(chat.model, chat.processor, talk.said)
    assert rows.shape == (1, len(talk.said.answer), 2, 16)
    torch.testing.assert_close(rows.sum((-1, -2)), torch.ones(rows.shape[:2]), atol=1e-5, rtol=0)


def test_honeybee_looks_at_some_queries_as_at_all():
    from mllm_replica.honeybee.attention import attention_maps
    from mllm_replica.honeybee.looking import query_maps

    chat, talk = talked(chat_of('honeybee').model)
    pixels = chat.processor.image_tensor(talk.said.prompt.images)
    whole = attention_maps(chat.model.connector, chat.model.visual_features(pixels).detach())
    chosen = [(1, 2), (0, 3), (1, 0)]
    some_maps = query_maps(chat.model, chat.processor, talk.said, chosen)
    torch.testing.assert_close(some_maps, torch.stack([whole[i, query] for i, query in chosen]))


def test_eagle_without_encoders_is_blind():
    "Silent, all pictures give the same answer as likely; one encoder alone tells them apart."
    from mllm_replica.eagle.looking import answer_log_probabilities, losses, silent

    chat, talk = talked(chat_of('eagle').model)
    clip, convnext = chat.model.vision_model.vision_towers
    swapped = replace(talk.said, prompt=replace(talk.said.prompt, images=talk.said.prompt.images[::-1]))

    def differ():
        found = [answer_log_probabilities(chat.model, chat.processor, said) for said in (talk.said, swapped)]
        return not torch.equal(*found)

    with silent(clip):
        assert differ()
        with silent(convnext):
            assert not differ()
    assert differ()
    assert losses(chat.model, chat.processor, talk.said).shape == (2, len(talk.said.answer))


def test_views_of_a_picture_count_as_one():
    "MM1 with an overview and crops."
    from mllm_replica.mm1.model import MM1Config, MM1Model
    from toys import VISION

    torch.manual_seed(0)
    connector, text = dict(connector_type='avg', num_query_tokens=4), TEXT | dict(max_position_embeddings=256)
    vision = VISION | dict(image_size=16)
    model = MM1Model(
        MM1Config(vision_config=vision, connector_config=connector, text_config=text, sub_images=32)
    ).eval()
    chat, talk = talked(model)
    assert talk.said.prompt.views == 5
    rows = attention_rows(model, chat.processor, talk.said)
    assert per_picture(rows, talk.said).shape[-1] == 2
    torch.testing.assert_close(per_picture(rows, talk.said).sum(-1), shares(rows, talk.said)['pictures'])
    assert len(chat.explain(talk).axes) > 3


def test_words_of_an_answer():
    processor = chat_of('owl2').processor
    ids = text_ids(processor.tokenizer, 'It is $5, über.\nYes')
    words = words_of(processor, ids)
    assert [word for word, _, _ in words] == ['It', 'is', '$5,', 'über.', 'Yes']
    assert [i for _, start, stop in words for i in range(start, stop)] == [*range(len(ids))]
    assert by_word(torch.eye(len(ids)), words).sum() == pytest.approx(len(words))


@pytest.mark.parametrize('paper', PAPERS)
def test_nothing_to_look_at_is_told(paper):
    chat, talk = chat_of(paper), Conversation()
    with pytest.raises(Trouble, match='no answer yet'):
        chat.explain(talk)
    once(chat, talk, 'what?')
    with pytest.raises(Trouble, match='no picture yet'):
        chat.explain(talk)


# --- the page -------------------------------------------------------------------------------------------------------------
def served(paper, answer=None):
    pytest.importorskip('gradio', reason='the extra `demo` is not installed')
    from mllm_replica.demo.page import build_page, launch

    page = build_page(chat_of(paper) if answer is None else Chat(answer, chat_of(paper).processor), 'toy')
    return page, launch(page, 0)


@pytest.mark.nightly
@pytest.mark.parametrize('paper', PAPERS)
def test_the_page_answers_and_explains(paper, files):
    chromium = pytest.importorskip('chromium')
    if chromium.missing:
        pytest.skip(f'{chromium.missing}: not installed (Debian: chromium chromium-driver)')
    page, address = served(paper)
    try:
        with chromium.browser() as window:
            window.open(address)
            window.wait("document.querySelector('#box textarea')")
            window.type('#box input[type=file]', f'{files}/words.jpg')
            window.wait("document.querySelectorAll('#box .thumbnail-item').length == 1")
            window.type('#box textarea', 'what?\ue007')
            window.wait("document.querySelector('#status').innerText.includes('not a readable PNG')")
            assert window.run("return document.querySelectorAll('#conversation .message').length") == 0
            window.open(address)
            window.wait("document.querySelector('#box textarea')")
            window.type('#box input[type=file]', f'{files}/red.png\n{files}/blue.png')
            window.wait("document.querySelectorAll('#box .thumbnail-item').length == 2")
            window.type('#box textarea', 'which?\ue007')
            window.wait("(document.querySelector('#picture img') || {}).naturalWidth > 400")
            assert window.run("return document.querySelector('#status').innerText").startswith('2 pictures, ')
            assert len(window.run("return document.querySelector('#conversation .bot').innerText")) > 3
            assert len(window.screenshot()) > 20_000
            assert window.hosts() == {'127.0.0.1'}, 'nothing is asked of the network'
    finally:
        page.close()


@pytest.mark.nightly
def test_the_page_stops_an_answer_and_shows_text_as_text(files):
    chromium = pytest.importorskip('chromium')
    if chromium.missing:
        pytest.skip(f'{chromium.missing}: not installed (Debian: chromium chromium-driver)')
    page, address = served(
        'honeybee', Parrot('![x](http://example.org/x.png) <img src="http://example.org/y.png"> ' * 12, 0.02)
    )
    try:
        with chromium.browser() as window:
            window.open(address)
            window.wait("document.querySelector('#box textarea')")
            window.type('#box textarea', 'go\ue007')
            window.wait("(document.querySelector('#conversation .bot') || {innerText: ''}).innerText.length > 60")
            window.click('#stop')
            window.wait("document.querySelector('#status').innerText.includes('No picture')", 20)
            said = window.run("return document.querySelector('#conversation .bot').innerText")
            assert '![x](http://example.org/x.png) <img src="http://example.org/y.png">' in said and len(said) < 600
            assert window.hosts() == {'127.0.0.1'}
            window.type('#box textarea', 'again\ue007')
            window.wait("document.querySelectorAll('#conversation .bot').length > 1")
            window.click('#new')
            window.wait("document.querySelectorAll('#conversation .bot').length == 0", 20)
            time.sleep(2)
            assert window.run("return document.querySelectorAll('#conversation .bot').length") == 0, 'it stays new'
    finally:
        page.close()


@pytest.mark.nightly
def test_the_page_is_served_here_only_and_refuses_large_files(files):
    import socket
    import httpx

    page, address = served('honeybee')
    try:
        port = int(address.rstrip('/').rsplit(':', 1)[1])
        addresses = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for other in addresses - {'127.0.0.1'}:
            with pytest.raises(OSError), socket.create_connection((other, port), timeout=3):
                pass
        assert httpx.get(address).status_code == 200 and 'googleapis' not in httpx.get(address).text
        large = {'files': ('a.png', b'\0' * (chatting.MAX_BYTES + 1000))}
        assert httpx.post(f'{address}gradio_api/upload', files=large, timeout=60).status_code == 413
        small = {'files': ('a.png', encode_png(Image.new('RGB', (8, 8))))}
        assert httpx.post(f'{address}gradio_api/upload', files=small, timeout=60).status_code == 200
        assert page.share_url is None and not page.analytics_enabled
    finally:
        page.close()


def test_a_page_without_gradio_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    found = run(folder('owl2'), '--web')
    assert found.exit_code == 1 and "pip install 'mllm_replica[demo]'" in found.stderr and found.stderr.count('\n') == 1
