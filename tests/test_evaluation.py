"""Answers do not depend on batches, padding, the cache of features or interruptions; wrong input says why."""

import json, signal, subprocess, sys, textwrap
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from fullsize.answers import Thousand
from PIL import Image

from mllm_replica.core.recipe import Benchmark
from mllm_replica.data.language import word_tokenizer
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.models.vlm import VisionLanguageModel, VisionLanguageProcessor
from mllm_replica.scoring.evaluation import (
    Predictions,
    collate_prompts,
    evaluate,
    greedy,
    left_padded,
    log_probabilities,
)

COLORS = ['red', 'green', 'blue', 'dark red', 'dark blue']
ASK = Benchmark(name='colors', source='x', batch_size=7, max_new_tokens=3)
PICK = ASK.model_copy(update={'method': 'options'})


@pytest.fixture(scope='module')
def world():
    "A small untrained model with sharp weights, and samples with none, one and two images and prompts of several lengths."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = word_tokenizer(['what color is it', 'tell me', 'and', '?', *COLORS])
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    model = VisionLanguageModel(VisionLanguageConfig(vision_config=vision, text_config=text)).eval()
    torch.nn.init.normal_(model.connector.weight, std=3.0)

    def sample(i):
        images = [
            Image.new('RGB', (16, 16), tuple((37 * i + 90 * j + 40 * c) % 256 for c in range(3))) for j in range(i % 3)
        ]
        question = 'tell me ' * (i % 4) + '<image> and ' * len(images) + 'what color is it ?'
        return dict(
            id=f's{i}',
            images=images,
            task=['one', 'two'][i % 2],
            answer=COLORS[i % 5],
            options=COLORS,
            meta='{}',
            document='',
            conversations=[{'from': 'human', 'value': question}, {'from': 'gpt', 'value': COLORS[i % 5]}],
        )

    processor = VisionLanguageProcessor.from_config(model.config, tokenizer)
    return SimpleNamespace(model=model, processor=processor, samples=[sample(i) for i in range(23)])


def answers(world, path, bench=ASK, **kwargs):
    evaluate(world.model, world.processor, bench, world.samples, path, **kwargs)
    return {key: row['prediction'] for key, row in Predictions(path).rows.items()}


def right_padded(world):
    "A collate function that pads on the right, as in training."

    def collate(encoded):
        batch = collate_prompts(encoded, world.processor)
        order = (1 - batch['attention_mask']).argsort(dim=1, stable=True)
        return batch | {key: batch[key].gather(1, order) for key in ('input_ids', 'attention_mask')}

    return collate


@pytest.mark.parametrize('bench', [ASK, PICK], ids=['generate', 'options'])
def test_answers_do_not_depend_on_the_batch(world, tmp_path, bench):
    expected = answers(world, tmp_path / 'a.jsonl', bench)
    assert len(set(expected.values())) > 1, 'the model always says the same; the test would show nothing'
    for name, other in dict(
        one=bench.model_copy(update={'batch_size': 1}), all=bench.model_copy(update={'batch_size': 100})
    ).items():
        assert answers(world, tmp_path / f'{name}.jsonl', other) == expected
    assert answers(world, tmp_path / 'right.jsonl', bench, collate=right_padded(world)) == expected


def test_features_of_a_frozen_encoder_give_the_same_answers(world, tmp_path):
    class Cache:
        def __init__(self):
            self.table = {}

        def __getitem__(self, names):
            return torch.stack([self.table[name] for name in names])

    cache = Cache()
    for sample in world.samples:
        for name, image in zip(world.processor.encode(sample).image_ids, sample['images']):
            with torch.no_grad():
                cache.table[name] = world.model.visual_features(world.processor.image_tensor([image]))[0]
    for bench in (ASK, PICK):
        assert answers(world, tmp_path / f'c{bench.method}', bench, features=cache) == answers(
            world, tmp_path / f'p{bench.method}', bench
        )


def test_greedy_equals_a_loop_without_cache(world):
    prompts = [world.processor.encode(sample, training=False) for sample in world.samples[:8]]
    found = greedy(world.model, collate_prompts(prompts, world.processor), 4)
    for prompt, tokens in zip(prompts, found):
        batch, expected = collate_prompts([prompt], world.processor), []
        for _ in range(4):
            with torch.no_grad():
                token = int(world.model(**batch).logits[0, -1].argmax())
            if token == 2:
                break
            expected.append(token)
            ids = torch.cat([batch['input_ids'], torch.tensor([[token]])], 1)
            batch |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert tokens == expected


def test_option_scores_equal_plain_log_probabilities(world, tmp_path):
    sample, best = world.samples[5], {}
    prompt = world.processor.encode(sample, training=False)
    for option in COLORS:
        turns = [sample['conversations'][0], {'from': 'gpt', 'value': option}]
        full = world.processor.encode(dict(sample, conversations=turns))
        batch, k = collate_prompts([full], world.processor), len(full.input_ids) - len(prompt.input_ids)
        with torch.no_grad():
            logp = world.model(**batch).logits[0].log_softmax(-1)
        parts = [float(logp[i - 1, full.input_ids[i]]) for i in range(len(full.input_ids) - k, len(full.input_ids))]
        assert float(log_probabilities(world.model, batch, torch.tensor([k]))[0]) == pytest.approx(sum(parts), abs=1e-4)
        best[option] = sum(parts), sum(parts) / k
    for i, mean in enumerate((False, True)):
        assert answers(world, tmp_path / f'{mean}', PICK, mean=mean)['s5'] == max(best, key=lambda o: best[o][i])


def test_sum_and_mean_differ_when_lengths_differ(world, tmp_path):
    assert answers(world, tmp_path / 'sum', PICK) != answers(world, tmp_path / 'mean', PICK, mean=True)


@pytest.mark.parametrize('fraction', [0, 0.01, 0.3, 0.5, 0.77, 0.999])
def test_a_file_cut_anywhere_is_completed(world, tmp_path, fraction):
    answers(world, tmp_path / 'whole', PICK)
    whole = (tmp_path / 'whole').read_bytes()
    (tmp_path / 'cut').write_bytes(whole[: int(len(whole) * fraction)])
    answers(world, tmp_path / 'cut', PICK)
    assert sorted((tmp_path / 'cut').read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_finished_evaluation_asks_nothing(world, tmp_path):
    first = evaluate(world.model, world.processor, ASK, world.samples, tmp_path / 'p')
    broken = SimpleNamespace(
        training=False, eval=lambda: None, train=lambda mode: None, device='cpu'
    )  # has no generate
    assert evaluate(broken, world.processor, ASK, world.samples, tmp_path / 'p') == first


def test_an_exception_between_batches_keeps_what_was_answered(world, tmp_path):
    def stop(done, total):
        if done >= 14:
            raise KeyboardInterrupt

    world.model.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(world.model, world.processor, ASK, world.samples, tmp_path / 'p', progress=stop)
    assert world.model.training and len(Predictions(tmp_path / 'p').rows) == 14
    world.model.eval()
    seen = []
    evaluate(world.model, world.processor, ASK, world.samples, tmp_path / 'p', progress=lambda *n: seen.append(n))
    assert seen == [(21, 23), (23, 23)]


def test_killed_in_the_middle(tmp_path):
    "SIGKILL while predictions are written: the file has whole lines and perhaps one torn one, and is continued."
    code = textwrap.dedent(f"""
        from mllm_replica.scoring.evaluation import Predictions
        p = Predictions({str(tmp_path / 'p')!r})
        i = len(p.rows)
        print("ready", flush=True)
        while True:
            p.append([dict(id=str(i + j), prediction="x" * 500, answer="x", correct=1.0) for j in range(50)]); i += 50
    """)
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not (tmp_path / 'p').exists() or (tmp_path / 'p').stat().st_size < 60 * 500:
        assert process.poll() is None  # more than its first fifty rows
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = Predictions(tmp_path / 'p').rows
    assert list(rows) == [str(i) for i in range(len(rows))] and len(rows) >= 50
    assert (tmp_path / 'p').read_bytes().endswith(b'\n')
    Predictions(tmp_path / 'p').append([dict(id='last', prediction='x', answer='x', correct=1.0)])
    assert list(Predictions(tmp_path / 'p').rows) == [*rows, 'last']


def test_score_and_interval_come_from_the_file(world, tmp_path):
    score = evaluate(world.model, world.processor, PICK, world.samples, tmp_path / 'p')
    rows = [json.loads(line) for line in (tmp_path / 'p').read_text().splitlines()]
    assert set(rows[0]) == {'id', 'prediction', 'answer', 'correct'}
    assert score.n == 23 and score.value == pytest.approx(sum(r['prediction'] == r['answer'] for r in rows) / 23)
    assert score.low <= score.value <= score.high


def test_tasks_choose_samples(world, tmp_path):
    score = evaluate(
        world.model, world.processor, ASK.model_copy(update={'tasks': ('two',)}), world.samples, tmp_path / 'p'
    )
    assert score.n == 11 and all(int(key[1:]) % 2 for key in Predictions(tmp_path / 'p').rows)


def test_several_peoples_answers_are_used(world, tmp_path):
    people = [dict(s, meta=json.dumps({'answers': ['nothing'] * 10})) for s in world.samples]
    assert (
        evaluate(
            world.model, world.processor, PICK.model_copy(update={'metric': 'vqa_accuracy'}), people, tmp_path / 'p'
        ).value
        == 0
    )


def test_wrong_samples_and_files(world, tmp_path):
    def run(samples, bench=ASK, name='bad'):
        return evaluate(world.model, world.processor, bench, samples, tmp_path / name)

    first = world.samples[0]
    with pytest.raises(ValueError, match="two samples have the id 's0'"):
        run([first, first])
    with pytest.raises(ValueError, match="sample 's0' has no answer"):
        run([dict(first, answer='')])
    with pytest.raises(ValueError, match="'s0' does not suit its metric"):
        run([first], ASK.model_copy(update={'metric': 'letter'}))
    with pytest.raises(ValueError, match='not among its options'):
        run([dict(first, options=[])], PICK)
    with pytest.raises(ValueError, match='no samples'):
        run([])
    with pytest.raises(KeyError, match='unknown metric'):
        run([first], ASK.model_copy(update={'metric': 'bleu'}))
    run([first], name='one')
    with pytest.raises(ValueError, match='another sample'):
        run([world.samples[1]], name='one')
    (tmp_path / 'one').write_text('{"id": \n{"id": "s0"}\n')
    with pytest.raises(ValueError, match='line 1 is no JSON'):
        run([first], name='one')


def test_left_padded_keeps_tokens_in_order():
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(1, 99, (20, 9), generator=g), (torch.rand(20, 9, generator=g) < 0.6).long()
    moved = left_padded(dict(input_ids=ids, attention_mask=mask, labels=ids, ids=['x']))
    assert set(moved) == {'input_ids', 'attention_mask'}
    for row, m, new, new_mask in zip(ids, mask, moved['input_ids'], moved['attention_mask']):
        assert new[new_mask.bool()].tolist() == row[m.bool()].tolist() and new_mask.tolist() == sorted(m.tolist())


def test_a_thousand_one_word_answers_are_two_passes_a_batch(tmp_path):
    "The second pass reads one token: the cache holds the rest."
    asked, seen = Thousand(), Counter()
    asked.model.model.layers[0].register_forward_hook(lambda _, __, out: seen.update([tuple(out.shape[:2])]))
    asked(tmp_path / 'p')
    assert seen == {(100, 37): 10, (100, 1): 10}


def test_several_right_answers_serve_any_metric(world, tmp_path):
    def value(answers, metric='exact_match'):
        bench = PICK.model_copy(update={'metric': metric})
        asked = [dict(s, meta=json.dumps({'answers': answers(s)})) for s in world.samples]
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        return evaluate(world.model, world.processor, bench, asked, path).value

    for metric in ('exact_match', 'token_f1', 'word_accuracy', 'anls'):
        assert value(lambda s: COLORS, metric) == 1  # whatever was picked is right
    told = lambda s: [dict(answer=color, answer_confidence='yes', answer_id=i) for i, color in enumerate(COLORS)]  # noqa: E731
    assert value(told) == 1 and 0 < value(told, 'vqa_accuracy') < 1
    for wrong in (7, ['red', 3], [{'text': 'red'}], {'red': 1}):
        with pytest.raises(ValueError, match="sample 's0' does not suit its metric: the answer is"):
            value(lambda s: wrong)
    broken = [dict(world.samples[0], meta='[' * 100_000)]
    with pytest.raises(ValueError, match="sample 's0' does not suit its metric"):
        evaluate(world.model, world.processor, PICK, broken, tmp_path / 'broken')


@pytest.mark.parametrize('line', ['[1]', '7', '{"prediction": "x"}', '[' * 100_000, '"\\ud800"'])
def test_a_line_that_is_no_prediction_is_named(line, tmp_path):
    (tmp_path / 'p').write_text(line + '\n')
    with pytest.raises(ValueError, match='p line 1 is no'):
        Predictions(tmp_path / 'p')


def test_a_prediction_without_its_score_is_named(world, tmp_path):
    first = world.samples[0]
    for correct in ({}, {'correct': None}, {'correct': 7}, {'correct': 'yes'}):
        row = dict(id='s0', prediction='x', answer=first['answer']) | correct
        (tmp_path / 'p').write_text(json.dumps(row) + '\n')
        with pytest.raises(ValueError, match="p: the prediction for sample 's0' has no score"):
            evaluate(world.model, world.processor, ASK, [first], tmp_path / 'p')
