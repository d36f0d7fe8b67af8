"Properties of the shared vision-language model: padding, batching, packing, loss, attention kernels, saving."

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toys import TEXT, VISION
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

from mllm_replica.data.language import byte_tokenizer
from mllm_replica.models.processing import split_images
from mllm_replica.models.configuration import VisionLanguageConfig
from mllm_replica.models.vlm import VisionLanguageModel, VisionLanguageProcessor

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return VisionLanguageModel(VisionLanguageConfig(vision_config=VISION, text_config=TEXT)).eval()


@pytest.fixture(scope='module')
def processor(model):
    return VisionLanguageProcessor.from_config(model.config, byte_tokenizer())


@pytest.fixture(scope='module')
def encoded(processor):
    "Two adjacent images, none, one: prompts of different lengths."

    def sample(i, question):
        return dict(
            id=str(i),
            conversations=[{'from': 'human', 'value': question}, {'from': 'gpt', 'value': f'answer {i}'}],
            images=[Image.new('RGB', (9, 9), (i * 60, k * 90, 30)) for k in range(question.count('<image>'))],
        )

    return [
        sample(0, '<image><image> which ?'),
        sample(1, 'text only, and long enough'),
        sample(2, 'see <image> here'),
        sample(3, '<image>'),
    ]


def batch_of(encoded, side, processor, key='input_ids', pad=0):
    length = max(len(e.input_ids) for e in encoded)

    def row(e, values, fill):
        return (
            [fill] * (length - len(values)) + list(values)
            if side == 'left'
            else list(values) + [fill] * (length - len(values))
        )

    images = [image for e in encoded for image in e.images]
    out = dict(
        input_ids=torch.tensor([row(e, e.input_ids, 0) for e in encoded]),
        attention_mask=torch.tensor([row(e, [1] * len(e), 0) for e in encoded]),
        labels=torch.tensor([row(e, e.labels, -100) for e in encoded]),
    )
    return out | (dict(pixel_values=processor.image_tensor(images)) if images else {})


def test_answers_do_not_depend_on_batch_or_padding(model, processor, encoded):
    prompts = [processor.encode(s, training=False) for s in encoded]

    def answers(prompts, side, **kwargs):
        batch = batch_of(prompts, side, processor)
        del batch['labels']
        return model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, **kwargs)[
            :, batch['input_ids'].shape[1] :
        ].tolist()

    alone = [answers([p], 'left')[0] for p in prompts]
    assert len({tuple(a) for a in alone}) == 4
    for side in ('left', 'right'):
        assert answers(prompts, side) == alone
        assert answers(prompts, side, use_cache=False) == alone
        assert answers(prompts[::-1], side) == alone[::-1]
        assert answers(prompts[1:2] * 2, side) == alone[1:2] * 2  # a batch without images
    assert (
        answers(prompts, 'right', num_beams=2, num_return_sequences=2)[0] != []
        and len(answers(prompts, 'left', num_beams=2, num_return_sequences=2)) == 8
    )


def test_images_matter_and_are_projected_once(model, processor, encoded, monkeypatch):
    prompt = processor.encode(encoded[0], training=False)
    ids, pixels = torch.tensor([prompt.input_ids]), processor.image_tensor(prompt.images)
    calls = []
    hook = model.connector.register_forward_hook(lambda *a: calls.append(1))
    answer = model.generate(ids, pixel_values=pixels, max_new_tokens=6, eos_token_id=None)
    hook.remove()
    assert len(calls) == 1
    assert torch.equal(
        answer, model.generate(ids, image_features=model.visual_features(pixels), max_new_tokens=6, eos_token_id=None)
    )
    with torch.no_grad():
        assert not torch.allclose(
            model(ids, pixel_values=pixels).logits[:, -1], model(ids, pixel_values=pixels.flip(0)).logits[:, -1]
        )


def test_loss_equals_full_logits(model, processor, encoded):
    batch = batch_of([processor.encode(s) for s in encoded], 'right', processor)
    losses, grads = [], []
    for full in (False, True):
        model.zero_grad()
        out = model(**batch, return_logits=full)
        assert (out.logits is not None) == full
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten()) if full else out.loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    assert (
        grads[0].keys() == grads[1].keys()
        and any('vision_model' in n for n in grads[0])
        and any('connector' in n for n in grads[0])
    )
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_accumulation_equals_the_full_batch(model, processor, encoded):
    samples = [processor.encode(s) for s in encoded]
    whole = batch_of(samples, 'right', processor)
    count = int((whole['labels'][:, 1:] != -100).sum())
    with torch.no_grad():
        parts = sum(
            model(**batch_of(samples[i : i + 2], 'right', processor), num_items_in_batch=count).loss for i in (0, 2)
        )
        torch.testing.assert_close(parts, model(**whole).loss)


def test_packed_rows_equal_separate_samples(model, processor, encoded):
    samples = [processor.encode(s) for s in encoded]
    joined = dict(
        input_ids=torch.tensor([[i for e in samples for i in e.input_ids] + [0, 0]]),
        position_ids=torch.tensor([[i for e in samples for i in range(len(e))] + [0, 0]]),
        pixel_values=batch_of(samples, 'right', processor)['pixel_values'],
    )
    segments = torch.tensor([i for i, e in enumerate(samples) for _ in range(len(e))] + [-1, -1])
    allowed = (segments[:, None] == segments) & torch.ones(len(segments), len(segments)).tril().bool()
    finished = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        alone = torch.cat(
            [
                model(
                    torch.tensor([e.input_ids]), pixel_values=processor.image_tensor(e.images) if e.images else None
                ).logits[0]
                for e in samples
            ]
        )
        for mask in (None, (segments >= 0).long()[None], finished):
            packed = model(**joined, attention_mask=mask).logits[0]
            torch.testing.assert_close(packed[: len(alone)], alone, atol=1e-4, rtol=1e-4)


def test_attention_by_name(model, processor, encoded):
    batch = batch_of([processor.encode(s) for s in encoded], 'left', processor)
    with torch.no_grad():
        assert model.config._attn_implementation == 'sdpa'
        sdpa = model(**batch, return_logits=True)
        model.set_attn_implementation('eager')
        assert (
            model.vision_model.config._attn_implementation
            == model.language_model.config._attn_implementation
            == 'eager'
        )
        eager = model(**batch, return_logits=True)
        model.set_attn_implementation('sdpa')
    real = batch['attention_mask'].bool()
    torch.testing.assert_close(sdpa.logits[real], eager.logits[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sdpa.loss, eager.loss)


def test_gradient_checkpointing_changes_nothing(model, processor, encoded):
    batch = batch_of([processor.encode(s) for s in encoded], 'right', processor)
    model.train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        assert (
            model.language_model.model.layers[0].gradient_checkpointing
            == checkpointed
            == model.vision_model.encoder.layers[0].gradient_checkpointing
        )
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.gradient_checkpointing_disable()
    model.eval()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_save_and_load_with_tied_words(tmp_path):
    torch.manual_seed(0)
    config = VisionLanguageConfig(
        vision_config=VISION, text_config=TEXT | {'tie_word_embeddings': True}, image_token_id=258, feature_layer=-1
    )
    model = VisionLanguageModel(config).eval()
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    ids, pixels = torch.tensor([[1, 258, 258, 258, 258, 9, 10]]), torch.randn(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VisionLanguageConfig)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert (
        again.config.feature_layer == -1
        and again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    )
    with torch.no_grad():
        assert torch.equal(again(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)


def test_half_precision_runs(model, processor, encoded):
    batch = batch_of([processor.encode(s) for s in encoded], 'right', processor)
    half = VisionLanguageModel(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(half(**batch).loss, model(**batch).loss, atol=0.1, rtol=0.05, check_dtype=False)


def test_what_does_not_fit_names_the_sample(model):
    pixels = torch.randn(2, 3, 8, 8)
    cases = {
        (1, -1, -1, -1, -1, 5): 'sample 1: found 0 image positions, expected 4: 1 of 2 images are left over',
        (1, -1, -1, -1, 5, 5): 'sample 0: found 3 image positions',
    }
    for ids, message in cases.items():
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([ids, (1, 2, 3, 4, 5, 6)]), pixel_values=pixels)
    with pytest.raises(ValueError, match='sample 1 has image positions but neither'):
        model(torch.tensor([[1, 2], [1, -1]]))
    with pytest.raises(ValueError, match='all .* labels are -100'):
        model(torch.tensor([[1, 2]]), labels=torch.tensor([[-100, -100]]))


def test_documents_and_splitting(processor):
    assert [p.text for p in split_images('<image>a <image> <image>b')] == [None, 'a', None, None, 'b']
    encoded = processor.encode(dict(id='d', images=[Image.new('RGB', (2, 2))], document='A cat. <image> A dog.'))
    assert [i for i in encoded.labels if i >= 0] == [3 + b for b in b'A cat.' + b'A dog.'] + [
        2
    ] and encoded.image_spans == [(7, 11)]


def test_sub_configs_may_be_objects():
    config = VisionLanguageConfig(
        vision_config=VISION, text_config=LlamaConfig(**{k: v for k, v in TEXT.items() if k != 'model_type'})
    )
    assert config.get_text_config().vocab_size == 259 and config.visual_token_count() == 4
