"The model that lmms-eval and lm-eval see: without them in `make test`, in them where they are installed (`make nightly`)."

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import harnesses
import pytest
import torch

from mllm_replica.core.registry import PAPERS
from mllm_replica.core.settings import Trouble
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.evaluating import lmms
from mllm_replica.evaluating.checkpoints import load_saved
from mllm_replica.evaluating.lmms import Chat, Simple
from mllm_replica.evaluating.scores import lmms_scores, text_scores

torch.set_num_threads(1)
TINY: dict[str, Path] = {}
PICTURES = harnesses.pictures(6)
HOW = dict(max_new_tokens=5, do_sample=False, until=['\n\n'])
TASKS = [f'local_{name}' for name in ('one', 'many', 'between', 'film', 'text')]


@pytest.fixture
def tiny(tmp_path_factory):
    "The folder of a paper's small model, made once."

    def folder(paper):
        if paper not in TINY:
            TINY[paper] = harnesses.save_tiny(paper, tmp_path_factory.mktemp('tiny') / paper)
        return TINY[paper]

    return folder


def request(kind, *arguments):
    return SimpleNamespace(request_type=kind, args=arguments)


def image(picture):
    return dict(type='image', url=picture)


def words(text):
    return dict(type='text', text=text)


ROWS = [  # what is said of each document
    [image(PICTURES[0]), words('What is this?')],
    [words('Why?')],
    [image(PICTURES[1]), image(PICTURES[2]), words('Which of them is larger, the first or the second?')],
    [words('Is'), image(PICTURES[3]), words('or'), image(PICTURES[4]), words('red?')],
    [dict(type='video', url=PICTURES[:3]), words('What happens?')],
    [image(PICTURES[0]), words('What is this?')],
]


def chat(folder, said=ROWS, **how):
    "A model and the requests of a task with these documents."
    model = Chat(str(folder), **how)
    model.task_dict = {'t': {'test': [*range(len(said))]}}

    def messages(number):
        return [dict(role='user', content=said[number])]

    asked = [request('generate_until', f'{row}', messages, HOW, n, 't', 'test') for n, row in enumerate(said)]
    return model, asked


@pytest.mark.parametrize('paper', PAPERS)
def test_answers_do_not_depend_on_the_batch(paper, tiny):
    answers = []
    for size in (1, 8):
        model, asked = chat(tiny(paper), batch_size=size)
        answers.append(model.generate_until(asked))
    assert answers[0] == answers[1] and answers[0][0] == answers[0][5]
    assert len(set(answers[0])) > 2, 'different questions, different answers'


def test_the_forms_say_the_same(tiny):
    folder, said = tiny('honeybee'), [ROWS[0], ROWS[2]]
    model, asked = chat(folder, said)
    simple = Simple(str(folder))
    simple.task_dict = model.task_dict

    def visuals(number):
        return [part['url'] for part in said[number] if part['type'] == 'image']

    plain = [request('generate_until', said[n][-1]['text'], HOW, visuals, n, 't', 'test') for n in range(2)]
    assert simple.generate_until(plain) == model.generate_until(asked)


def test_the_papers_prompt_is_asked(tiny):
    model, asked = chat(tiny('owl2'), [ROWS[0]])
    sample = lmms.sample_of('0', model.messages(asked[0]), 8, model.between)
    ids = model.processor.encode(sample, training=False).input_ids
    text = model.processor.tokenizer.decode([i for i in ids if i != model.processor.image_token_id])
    assert text.endswith('USER: What is this? ASSISTANT:'), text


def test_what_was_answered_is_not_asked_again(tiny, tmp_path, monkeypatch):
    folder, kept = tiny('honeybee'), tmp_path / 'kept'
    model, asked = chat(folder, batch_size=2, answers=str(kept))
    monkeypatch.setattr(lmms, 'answered', stopping(lmms.answered, 1))
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(asked)
    monkeypatch.undo()
    expected = chat(folder)[0].generate_until(asked)
    again, _ = chat(folder, batch_size=2, answers=str(kept))
    assert 0 < len(again.answers.known) < len(asked)
    assert again.generate_until([*asked, asked[-1]]) == [*expected, expected[-1]]
    lines = [line for path in kept.iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == len(asked), 'each once'

    last, _ = chat(folder, answers=str(kept))
    monkeypatch.setattr(lmms, 'answered', None)
    assert last.generate_until(asked) == expected
    for changed in (dict(dtype='bfloat16'), dict(max_frames_num=2)):
        with pytest.raises(TypeError):
            chat(folder, answers=str(kept), **changed)[0].generate_until(asked)


def stopping(answered, batches):
    "Answering that is stopped after some batches."

    def some(*given, **how):
        for number, batch in enumerate(answered(*given, **how)):
            if number == batches:
                raise KeyboardInterrupt
            yield batch

    return some


@pytest.mark.parametrize('paper', ['honeybee', 'owl3'])
def test_losses_are_those_of_the_option(paper, tiny):
    found, options = [], ('yes', 'no', 'certainly not')
    for size in (1, 4):
        model = Simple(str(tiny(paper)), batch_size=size)
        model.task_dict = {'t': {'test': PICTURES[:2]}}
        rows = [(n, option) for n in range(2) for option in options]
        asked = [request('loglikelihood', 'Is it?', f' {o}', lambda row: [row], n, 't', 'test') for n, o in rows]
        found.append([getattr(loss, 'text', loss) for loss in model.loglikelihood(asked)])
    for (n, option), (loss, greedy), other in zip(rows, *found):
        said = [dict(role='user', content=[image(PICTURES[n]), words('Is it?')])]
        sample = lmms.sample_of('0', said, between=model.between)
        sample['conversations'][-1]['value'] = option
        encoded = model.processor.encode(sample)
        batch = lmms.collate_prompts([encoded], model.processor)
        with torch.no_grad():
            logits = model.model(**batch).logits[0, :-1].log_softmax(-1)
        at = [i for i, label in enumerate(encoded.labels) if label != -100]
        picked = torch.stack([logits[i - 1, encoded.labels[i]] for i in at])
        assert loss == pytest.approx(-float(picked.mean()), rel=1e-4) == other[0]
        assert greedy == other[1] == all(int(logits[i - 1].argmax()) == encoded.labels[i] for i in at)


def test_rounds_go_on_until_the_task_ends_them(tiny):
    model, _ = chat(tiny('honeybee'), batch_size=2)

    def messages(number, round_idx=None, previous_output=None, previous_round_info=None):
        said = [dict(role='user', content=ROWS[number] if round_idx is None else f'{previous_output[-1]!r} and?')]
        if round_idx is None:
            return said
        assert len(previous_output) == round_idx and previous_round_info == (round_idx - 1 or None)
        return said, round_idx > number, previous_output, round_idx

    asked = [request('generate_until_multi_round', '', messages, HOW, n, 't', 'test') for n in range(3)]
    found = model.generate_until_multi_round(asked)
    assert [len(answers) for answers in found] == [1, 2, 3]
    assert [answers[0] for answers in found] == chat(tiny('honeybee'))[0].generate_until(chat(tiny('honeybee'))[1][:3])


def test_several_pictures_are_not_cut(tiny, tmp_path):
    model, asked = chat(tiny('owl3'), batch_size=4)
    whole, folder = model.processor, shutil.copytree(tiny('owl3'), tmp_path / 'cutting')
    path = folder / 'processor_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(cropping=True)))
    model.processor = load_saved(folder)[1]
    one, two = (lmms.sample_of('0', model.messages(asked[n])) for n in (0, 2))
    assert len(model.processor.encode(one, training=False).images) > 1
    assert model.processor.encode(two, training=False) == whole.encode(two, training=False)
    assert len(model.generate_until(asked)) == len(asked)


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (dict(), 'no pretrained=FOLDER'),
        (dict(pretrained='/nowhere'), '/nowhere has no config.json'),
        (dict(batch_size='auto'), 'batch_size=auto: expected whole numbers'),
        (dict(dtype='floaty'), "dtype is 'floaty'; expected auto"),
        (dict(conv='vicuna'), "--model_args has \\['conv'\\]; known are pretrained, dtype"),
    ],
)
def test_what_is_wrong_is_said(given, said, tiny):
    given = given and dict(pretrained=tiny('honeybee')) | given
    with pytest.raises(Trouble, match=said):
        Chat(**given)


def test_sampling_is_refused(tiny):
    model, asked = chat(tiny('honeybee'))
    sampled = request('generate_until', 'Why?', asked[1].args[1], HOW | dict(do_sample=True), 1, 't', 'test')
    with pytest.raises(ValueError, match="task t asks for {'do_sample': True}, answers here are greedy"):
        model.generate_until([*asked, sampled])


def test_arguments_may_be_json(tiny):
    given = json.dumps(dict(pretrained=str(tiny('honeybee')), max_frames_num=3))
    model = Chat.create_from_arg_string(given, dict(batch_size='2', device=None, max_batch_size=None))
    assert (model.frames, model.batch_size) == (3, 2)


# --- in the harnesses -----------------------------------------------------------------------------------------------------
inside = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not (find_spec('lmms_eval') and find_spec('lm_eval')), reason='lmms-eval and lm-eval are not installed'
    ),
]


def nightly(test):
    for mark in inside:
        test = mark(test)
    return test


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    "A folder of tasks; data sets are cached beside it."
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    return harnesses.write_tasks(tmp_path / 'tasks')


def samples_of(out, task):
    "Document -> answer, as lmms-eval wrote them."
    (path,) = (out / 'lmms-eval').glob(f'**/*_samples_{task}.jsonl')
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row['doc_id'] for row in rows}) == len(rows)
    return {row['doc_id']: row['filtered_resps'] for row in rows}


@nightly
@pytest.mark.parametrize('paper', PAPERS)
def test_the_harness_gives_the_same_in_batches_and_processes(paper, tiny, tasks, tmp_path):
    folder, found = tiny(paper), []
    for size, processes in ((1, 1), (4, 2)):
        out = tmp_path / f'{processes}'
        how = dict(out=out, include=tasks, batch_size=size, processes=processes, max_frames_num=3, device='cpu')
        scores = lmms_scores(folder, TASKS, **how)
        answers = {task: samples_of(out, task) for task in TASKS}
        for task, said in answers.items():
            assert len(said) == 7
            assert scores[task] == {'said': pytest.approx(sum(map(len, said.values())) / 7)}
        assert len({answer for said in answers.values() for answer in said.values()}) > 2
        found.append((scores, answers))
    assert found[0] == found[1]


@nightly
def test_a_finished_evaluation_asks_nothing_again(tiny, tasks, tmp_path):
    how = dict(out=tmp_path / 'out', include=tasks, batch_size=4, device='cpu')
    first = lmms_scores(tiny('honeybee'), TASKS[:1], **how)
    kept = [*(tmp_path / 'out' / 'answers').iterdir()]
    assert len(kept) == 1 and lmms_scores(tiny('honeybee'), TASKS[:1], **how) == first
    assert [*(tmp_path / 'out' / 'answers').iterdir()] == kept
    assert lmms_scores(tiny('honeybee'), TASKS[:1], limit=3, **how)[TASKS[0]]['said'] != first


@nightly
def test_the_official_scorer_of_pope(tiny, tasks, tmp_path):
    import lmms_eval

    folder = make_yes(tiny('honeybee'), tmp_path / 'yes')
    official = Path(lmms_eval.__path__[0]) / 'tasks' / 'pope' / 'pope.yaml'
    (tasks / 'pope.yaml').write_text(harnesses.POPE.format(official=official, data=tasks / 'one.parquet'))
    scores = lmms_scores(folder, ['local_pope'], out=tmp_path / 'out', include=tasks, batch_size=3, device='cpu')
    assert set(samples_of(tmp_path / 'out', 'local_pope').values()) == {'yes'}
    true = dict(accuracy=4 / 7, precision=4 / 7, recall=1.0, f1_score=8 / 11, yes_ratio=4 / 7)
    assert scores == {'local_pope': {f'pope_{name}': pytest.approx(value) for name, value in true.items()}}


def make_yes(source, folder):
    "A copy of a model that answers yes whatever is asked."
    shutil.copytree(source, folder)
    tokenizer = byte_tokenizer()
    path = folder / 'generation_config.json'
    said = [*tokenizer('yes', add_special_tokens=False)['input_ids'], tokenizer.eos_token_id]
    bias = [[said[: n + 1], 1e4 * (n + 1)] for n in range(len(said))]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(sequence_bias=bias)))
    return folder


@nightly
def test_options_are_compared(tiny, tasks, tmp_path):
    folder, how = tiny('owl2'), dict(include=tasks, device='cpu')
    with pytest.raises(Trouble, match='local_choice: AssertionError: Currently messages is used for generation only'):
        lmms_scores(folder, ['local_choice'], out=tmp_path / 'chat', **how)
    scores = lmms_scores(folder, ['local_choice'], out=tmp_path / 'out', simple=True, batch_size=4, **how)
    found = samples_of(tmp_path / 'out', 'local_choice')
    right = [min(range(3), key=lambda n: losses[n][0]) == number % 2 for number, losses in found.items()]
    assert scores == {'local_choice': {'acc': pytest.approx(sum(right) / 7)}} and all(found.values())


@nightly
@pytest.mark.parametrize('paper', PAPERS)
def test_text_alone_in_lm_eval(paper, tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    folder, tasks = tiny(paper), harnesses.write_text_task(tmp_path / 'tasks')
    asked = ['local_options', 'local_said']
    found = text_scores(folder, asked, out=tmp_path / 'one', include=tasks, batch_size=3, device='cpu')
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for n in range(7):
        prompt, sums = 'Is this ' + 'very ' * (n % 4) + 'large?', []
        for option in ('yes', 'no', 'certainly not'):
            ids = torch.tensor([tokenizer(f'{prompt} {option}')['input_ids']])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1)
            length = len(option) + 1
            sums.append(float(scores.gather(1, ids[0, 1:, None])[-length:].sum()))
        right += max(range(3), key=sums.__getitem__) == n % 2
    assert found['local_options'] == {'acc': pytest.approx(right / 7)} and 0 < found['local_said']['said'] <= 6
    if paper == 'owl2':
        again = dict(out=tmp_path / 'two', include=tasks, processes=2, device='cpu')
        assert text_scores(folder, asked, **again) == found


@nightly
def test_trouble_in_a_harness_is_one_line(tiny, tasks, tmp_path):
    how = dict(out=tmp_path / 'out', include=tasks, device='cpu')
    with pytest.raises(Trouble, match='lmms-eval on local_nothing: ValueError: Tasks not found: local_nothing') as said:
        lmms_scores(tiny('honeybee'), ['local_nothing'], **how)
    assert '\n' not in str(said.value) and 'log.txt' in str(said.value)
    with pytest.raises(Trouble, match='lm-eval on nothing: '):
        text_scores(tiny('honeybee'), ['nothing'], **how)


@nightly
def test_lmms_eval_finds_the_model_by_itself():
    from lmms_eval.models import get_model

    assert get_model('mllm_replica') is Chat and get_model('mllm_replica', True) is Simple
