"""MM1's data: the worked packing, what packing must keep, that examples do not see each other, the frozen order, bad input."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from toys import TEXT, VISION
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mllm_replica.data.encoded import Encoded
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.mixture import Mixture
from mllm_replica.data.packing import collate, encode_document, pack, segment_mask
from mllm_replica.mm1.data import (
    KINDS,
    MAX_IMAGES,
    WEIGHTS,
    Frozen,
    best_fit,
    check_example,
    collate_sequences,
    encode_source,
    fill,
    join,
    make_sequences,
    next_fit,
)
from mllm_replica.mm1.presets import published_stages
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.models.vlm import VisionLanguageModel, VisionLanguageProcessor

torch.set_num_threads(1)
GOLDEN = yaml.safe_load((Path(__file__).parent / 'golden' / 'mm1' / 'packing.yaml').read_text())
LENGTH, VISUAL = GOLDEN['seq_len'], GOLDEN['k_visual_tokens']


def worked_example(number, parts):
    "An example of the golden file: names of images and lists of text ids."
    document = ' '.join('<image>' if isinstance(part, str) else ' '.join(map(str, part)) for part in parts)
    sample = dict(id=str(number), document=document, images=[part for part in parts if isinstance(part, str)])
    return encode_document(sample, lambda text: [int(word) for word in text.split()], 1, 2, -200, lambda image: VISUAL)


def example(id, length, images=0, block=1):
    spans = [(1 + block * i, 1 + block * (i + 1)) for i in range(images)]
    return Encoded(
        id, [1] * length, [-100] + [5] * (length - 1), images=[f'{id}.{i}' for i in range(images)], image_spans=spans
    )


def document(id, text):
    return dict(
        id=id,
        document=text,
        images=[Image.new('RGB', (9, 9), (ord(id[0]) % 256, 40 * i, 90)) for i in range(text.count('<image>'))],
    )


# the worked example


@pytest.fixture(scope='module')
def worked():
    sequences = make_sequences(
        [worked_example(i, parts) for i, parts in enumerate(GOLDEN['examples'])], LENGTH, GOLDEN['max_images'], next_fit
    )
    return sequences, collate_sequences(sequences, 0, image_tensor=lambda images: torch.zeros(len(images), 3, 2, 2))


def test_worked_sequences(worked):
    sequences, batch = worked
    assert len(sequences) == len(GOLDEN['sequences'])
    segments = (batch['position_ids'] == 0).cumsum(1) * batch['attention_mask']
    shifted = F.pad(batch['labels'][:, 1:], (0, 1), value=-100)
    tables = dict(
        tokens=(batch['input_ids'], 0),
        segment=(segments, 0),
        position=(batch['position_ids'], 0),
        labels=(shifted, -100),
    )
    for row, (sequence, golden) in enumerate(zip(sequences, GOLDEN['sequences'])):
        for name, (table, padding) in tables.items():
            assert table[row].tolist() + [padding] * (LENGTH - table.shape[1]) == golden[name], name
        assert sequence.images == golden['images']
        assert fill([sequence], LENGTH) == pytest.approx(golden['pack_efficiency'], abs=1e-9)
        assert int((shifted[row] != -100).sum()) == golden['loss_tokens']
        seen = (segment_mask(segments)[row, 0] == 0).sum(1) * (segments[row] > 0)
        assert (
            seen.tolist() + [0] * (LENGTH - len(seen)) == golden['mask_row_sums']
            and int(seen.sum()) == golden['mask_total']
        )


def test_worked_budget_and_weights():
    golden, stage = GOLDEN['paper_scale_budget'], published_stages('mm1-3b')[0]
    assert (stage.batch_size, stage.max_length, stage.steps) == (golden['batch'], golden['seq_len'], golden['steps'])
    assert stage.batch_size * stage.max_length * stage.steps == golden['total_tokens']
    assert 144 * MAX_IMAGES == golden['max_image_tokens_per_seq']
    assert WEIGHTS == GOLDEN['source_sampling'] and set(WEIGHTS) == set(KINDS)


# packing


@pytest.mark.parametrize('fit', [next_fit, best_fit])
@pytest.mark.parametrize('seed', range(5))
def test_packing_keeps_every_example_whole_and_both_limits(fit, seed):
    rng = random.Random(seed)
    examples = [example(str(i), rng.randint(8, 60), rng.randint(0, 4)) for i in range(200)]
    sequences = make_sequences(examples, 64, 6, fit)
    assert Counter('+'.join(s.id for s in sequences).split('+')) == Counter(e.id for e in examples)
    assert all(len(s) <= 64 and len(s.images) <= 6 and sum(s.lengths) == len(s) for s in sequences)
    assert [image for s in sequences for image in s.images] == [
        image for s in sequences for id in s.id.split('+') for image in examples[int(id)].images
    ]
    if fit is next_fit:
        assert [e.id for row in fit(examples, 64, 6) for e in row] == [e.id for e in examples]


@pytest.mark.parametrize('seed', range(3))
def test_best_fit_takes_the_fullest_sequence_with_room_for_tokens_and_images(seed):
    rng, rows = random.Random(seed), []
    examples = [example(str(i), rng.randint(8, 60), rng.randint(0, 4)) for i in range(150)]
    for e in sorted(examples, key=len, reverse=True):  # the plain, quadratic way
        room = [
            (64 - sum(map(len, row)), number)
            for number, row in enumerate(rows)
            if sum(map(len, row)) + len(e) <= 64 and sum(len(s.images) for s in row) + len(e.images) <= 6
        ]
        if not room:
            rows.append([])
        rows[min(room)[1] if room else -1].append(e)
    assert [[e.id for e in row] for row in best_fit(examples, 64, 6)] == [[e.id for e in row] for row in rows]


def test_best_fit_fills_the_fixed_list_and_is_the_house_packing_without_images():
    examples = [example(str(i), 24 + int(1000 * ((i * 0.6180339887498949) % 1) ** 3)) for i in range(2000)]
    sequences = make_sequences(examples, 1024)
    assert fill(sequences, 1024) >= 0.98 > fill(make_sequences(examples, 1024, fit=next_fit), 1024)
    assert [s.id for s in sequences] == ['+'.join(e.id for e in row) for row in pack(examples, 1024)]


@pytest.mark.parametrize('fit', [next_fit, best_fit])
def test_what_fits_no_sequence_is_named(fit):
    with pytest.raises(ValueError, match="document 'album' has 17 images, a sequence holds 16"):
        fit([example('ok', 9), example('album', 40, 17)], 64)
    with pytest.raises(ValueError, match="document 'novel' has 65 positions, a sequence 64"):
        fit([example('novel', 65)], 64)
    assert fit([], 64) == []
    assert [len(row) for row in fit([example('a', 64, 16), example('b', 1)], 64)] == [1, 1]


def test_images_are_where_a_sequence_says():
    sequence = join([worked_example(i, parts) for i, parts in enumerate(GOLDEN['examples'])])
    inside = {position for start, stop in sequence.image_spans for position in range(start, stop)}
    assert (
        inside == {i for i, token in enumerate(sequence.input_ids) if token == -200}
        and len(inside) == 4 * len(sequence.images) == 16
    )


def test_the_first_token_of_an_example_is_never_supervised():
    supervised = Encoded('a', [7, 8], [7, 8])
    assert join([supervised, supervised]).labels == [-100, 8, -100, 8]


# sequences in a model


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return VisionLanguageModel(VisionLanguageConfig(vision_config=VISION, text_config=TEXT)).eval()


@pytest.fixture(scope='module')
def examples(model):
    encode = VisionLanguageProcessor.from_config(model.config, byte_tokenizer()).encode
    documents = [
        document('a', '<image> a cat'),
        document('b', '<image> two dogs run'),
        document('c', 'see <image> then <image> there'),
        document('d', '<image> x'),
    ]
    return encode_source(documents, 'interleaved', encode, 48) + encode_source(
        [document('t', 'nothing to see')], 'text', encode, 48
    )


@pytest.mark.parametrize(
    'attention, stance',
    [
        ('sdpa', 'default'),
        ('eager', 'default'),
        ('flex_attention', 'force_eager'),
        pytest.param('flex_attention', 'default', marks=pytest.mark.nightly),
    ],
)  # compiled: half a minute
@pytest.mark.parametrize('count', [5, 1])  # sequences with and without neighbours
def test_packed_examples_are_predicted_as_if_alone(model, examples, attention, stance, count):
    model.set_attn_implementation(
        {'vision_config': 'sdpa' if attention == 'flex_attention' else attention, 'text_config': attention}
    )
    tensor = VisionLanguageProcessor.from_config(model.config, byte_tokenizer()).image_tensor

    def losses(batch):
        logits = model(**{k: v for k, v in batch.items() if k not in ('ids', 'labels')}, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch['labels'][:, 1:], ignore_index=-100, reduction='none'
        )

    sequences = make_sequences(examples[:count], 48, 3)
    assert len(sequences) < count or count == 1
    batch = collate_sequences(sequences, 0, image_tensor=tensor)
    with torch.no_grad(), torch.compiler.set_stance(stance):
        packed = losses(batch)
        alone = {e.id: losses(collate([e], 0, image_tensor=tensor))[0] for e in examples[:count]}
        whole = model(**{k: v for k, v in batch.items() if k != 'ids'}).loss
    for row, sequence in zip(packed, sequences):
        start = 0
        for name, length in zip(sequence.id.split('+'), sequence.lengths):
            torch.testing.assert_close(row[start : start + length - 1], alone[name], rtol=1e-5, atol=1e-5)
            start += length
    supervised = sum(label != -100 for e in examples[:count] for label in e.labels)
    torch.testing.assert_close(whole, sum(loss.sum() for loss in alone.values()) / supervised, rtol=1e-5, atol=1e-5)


def test_positions_alone_give_the_mask_and_the_gradients_of_the_dense_mask(model, examples):
    model.set_attn_implementation('sdpa')
    batch = collate_sequences(
        make_sequences(examples, 48, 3),
        0,
        image_tensor=VisionLanguageProcessor.from_config(model.config, byte_tokenizer()).image_tensor,
    )
    segments = torch.where(batch['attention_mask'] == 1, (batch['position_ids'] == 0).cumsum(1), -1)
    grads = []
    for mask in (batch['attention_mask'], segment_mask(segments)):
        model.zero_grad()
        model(
            **{k: v for k, v in batch.items() if k not in ('ids', 'attention_mask')}, attention_mask=mask
        ).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert grads[0].keys() == grads[1].keys() and any('vision' in name for name in grads[0])
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_kernel_without_masks_gets_the_borders_of_all_rows(model, examples):
    "A stand-in for flash attention: no mask, only cumulative lengths, as transformers hands them to the kernel."
    calls = []

    def by_segment(
        module,
        query,
        key,
        value,
        attention_mask,
        cu_seq_lens_q=None,
        cu_seq_lens_k=None,
        max_length_q=None,
        max_length_k=None,
        **kwargs,
    ):
        assert (
            attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k) and cu_seq_lens_q.dtype == torch.int32
        )
        lengths = cu_seq_lens_q.diff().tolist()
        assert max(lengths) == max_length_q == max_length_k and sum(lengths) == query.shape[0] * query.shape[2]
        calls.append(len(lengths))
        flat = [
            x.repeat_interleave(query.shape[1] // x.shape[1], 1).transpose(1, 2).flatten(0, 1).split(lengths)
            for x in (query, key, value)
        ]
        out = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True).transpose(0, 1)
            for part in zip(*flat)
        ]
        return torch.cat(out).view(query.shape[0], query.shape[2], *query.shape[1::2]), None

    AttentionInterface.register('by_segment', by_segment)
    AttentionMaskInterface.register('by_segment', ALL_MASK_ATTENTION_FUNCTIONS['flash_attention_2'])
    sequences = make_sequences(examples, 48, 3)
    batch = collate_sequences(
        sequences, 0, image_tensor=VisionLanguageProcessor.from_config(model.config, byte_tokenizer()).image_tensor
    )
    real = batch['attention_mask'].bool()
    logits = {}
    for attention in ('by_segment', 'sdpa'):
        model.set_attn_implementation({'vision_config': 'sdpa', 'text_config': attention})
        with torch.no_grad():
            logits[attention] = model(**{k: v for k, v in batch.items() if k not in ('ids', 'labels')}).logits[real]
    assert calls == [len(examples) + int((~real).sum())] * TEXT['num_hidden_layers'] and len(sequences) > 1
    torch.testing.assert_close(logits['by_segment'], logits['sdpa'], rtol=1e-5, atol=1e-5)


# the order


def walk(sizes, weights, seed, steps, batch_size):
    "Source and sequence of everything that is drawn."
    order = Frozen(sizes, weights, seed)
    return [place for step in range(steps) for place in order.indices(step, batch_size)]


def test_the_order_is_frozen_and_the_same_for_every_mixture(tmp_path):
    sizes = dict(interleaved=400, caption=400, text=400)

    def take(weights, source):
        return [i for name, i in walk(sizes, weights, 3, 20, 16) if name == source]

    assert walk(sizes, WEIGHTS, 3, 20, 16) == walk(sizes, WEIGHTS, 3, 20, 16) != walk(sizes, WEIGHTS, 4, 20, 16)
    assert (
        Frozen(sizes, WEIGHTS, 3).indices(19, 16) == walk(sizes, WEIGHTS, 3, 20, 16)[-16:]
    )  # any step alone, as after a resume
    Frozen(sizes, WEIGHTS, 3).save(tmp_path / 'order.json', 20, 16)
    assert Frozen.load(tmp_path / 'order.json').indices(7, 16) == Frozen(sizes, WEIGHTS, 3).indices(7, 16)
    with pytest.raises(ValueError, match='the recorded order is'):
        Mixture.load(tmp_path / 'order.json')
    caption, rare, only = (
        take(WEIGHTS, 'caption'),
        take({'caption': 1, 'text': 9}, 'caption'),
        take({'caption': 1}, 'caption'),
    )
    assert only != [i for _, i in walk(sizes, {'caption': 1}, 4, 20, 16)]
    assert len(rare) < len(caption) < len(only) == 320 == len(set(only))
    assert only[: len(caption)] == caption and caption[: len(rare)] == rare


def test_shares_follow_the_weights():
    counts = Counter(name for name, _ in walk(dict.fromkeys(WEIGHTS, 10_000), WEIGHTS, 0, 100, 100))
    for name, weight in WEIGHTS.items():
        assert abs(counts[name] / 10_000 - weight) < 3 * (weight * (1 - weight) / 10_000) ** 0.5


def test_a_source_is_used_up_to_its_last_sequence_and_not_beyond():
    assert sorted(i for _, i in walk({'caption': 32}, {'caption': 1.0}, 0, 4, 8)) == list(range(32))
    with pytest.raises(ValueError, match=r"source 'caption' is exhausted at step 5 of 8 sequences: it has 32"):
        walk({'caption': 32}, {'caption': 1.0}, 0, 5, 8)
    with pytest.raises(ValueError, match=r"source 'caption' is exhausted at step 8"):
        Frozen({'caption': 32}, {'caption': 1.0}, 0).indices(7, 8)  # at once


@pytest.mark.parametrize(
    'weights',
    [{'caption': -0.1, 'text': 1.1}, {'caption': 0.0, 'text': 0.0}, {}, {'caption': 1.0, 'text': float('nan')}],
)
def test_weights_that_are_no_weights(weights):
    with pytest.raises(ValueError, match='of the mixture: expected numbers from 0 on, not all of them 0'):
        Mixture({'caption': 5, 'text': 5}, weights, 0)


def test_a_wrong_weight_is_named():
    with pytest.raises(ValueError, match=r"weights \{'caption': -1\} of the mixture"):
        Mixture({'caption': 5, 'text': 5}, {'caption': -1, 'text': 2}, 0)


def test_a_source_of_weight_0_may_be_empty():
    sizes = {'caption': 5, 'text': 0}
    assert {name for name, _ in Mixture(sizes, {'caption': 1.0, 'text': 0.0}, 0).indices(3, 50)} == {'caption'}
    with pytest.raises(ValueError, match=r"sources \['text'\] of the mixture have no samples; add some"):
        Mixture(sizes, {'caption': 1.0, 'text': 0.1}, 0)


# documents


@pytest.mark.parametrize(
    'kind, text, message',
    [
        (
            'interleaved',
            '<image> ' * 17 + 'end',
            "document 'x' has 17 images, an example of kind 'interleaved' has 1 to 16; split it",
        ),
        ('interleaved', ' <image>\n<image> ', "document 'x' has no text"),
        ('interleaved', '', "document 'x' has no text"),
        ('interleaved', 'plain text', 'has 0 images'),
        ('caption', '<image> <image> both', "has 2 images, an example of kind 'caption' has 1;"),
        ('text', '<image> seen', "has 1 images, an example of kind 'text' has 0;"),
        ('sound', 'text', "unknown kind of data 'sound'; known: \\['caption', 'interleaved', 'text'\\]"),
    ],
)
def test_documents_that_are_no_examples(kind, text, message):
    with pytest.raises(ValueError, match=message):
        check_example(document('x', text), kind)


def test_images_and_placeholders_must_agree():
    with pytest.raises(ValueError, match="'x': 0 images but 1 <image> placeholders"):
        check_example(document('x', '<image> a') | dict(images=[]), 'caption')


def test_sixteen_images_are_allowed():
    check_example(document('x', '<image> ' * 16 + 'end'), 'interleaved')


def test_an_image_longer_than_a_sequence_is_an_error_and_a_long_document_is_cut_before_an_image():
    def encode(sample):
        return encode_document(sample, lambda text: [9] * len(text.split()), 1, 2, -1, lambda image: 6)

    with pytest.raises(
        ValueError, match="document 'x': an image takes 6 positions, but a sequence of 6 leaves 5 after its begin token"
    ):
        encode_source([document('x', '<image> a')], 'caption', encode, 6)
    cut = encode_source([document('x', 'a b <image> c <image> d')], 'interleaved', encode, 12)[0]
    assert cut.input_ids == [1, 9, 9, *[-1] * 6, 9] and len(cut.images) == 1
    with pytest.raises(ValueError, match="'x'.*nothing supervised is left"):
        encode_source([document('x', '<image> a')], 'caption', encode, 7)
