"What an engineer expects of any model of transformers, for all five."

import copy

import pytest
import torch
from toys import batch_of, model_of
from transformers import AutoModel, LogitsProcessor, StoppingCriteria, Trainer, TrainingArguments

from mllm_replica.core.registry import PAPERS

torch.set_num_threads(1)
GREEDY = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(params=PAPERS, scope='module')
def model(request):
    return model_of(request.param)


@pytest.fixture
def batch(model):
    return batch_of(model)


def alone(batch, row):
    real = batch['attention_mask'][row].bool()
    return dict(
        input_ids=batch['input_ids'][row][real][None],
        attention_mask=batch['attention_mask'][row][real][None],
        pixel_values=batch['pixel_values'][row : row + 1],
    )


def answers(model, batch, **how):
    "New tokens of every row."
    return model.generate(**batch, **GREEDY | how)[:, batch['input_ids'].shape[1] :]


@pytest.mark.parametrize(
    'how',
    [
        {},
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=2),
        dict(encoder_repetition_penalty=1.5),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2),
        dict(bad_words_ids=[[11], [12, 13]]),
    ],
    ids=str,
)
def test_a_row_answers_as_it_answers_alone(model, batch, how):
    several = how.get('num_return_sequences', 1)
    together = answers(model, batch, **how)
    for row in range(2):
        one = alone(batch, row)
        assert torch.equal(together[row * several : (row + 1) * several], answers(model, one, **how))


@pytest.mark.parametrize(
    'how',
    [
        dict(use_cache=False),
        dict(cache_implementation='static'),
        dict(prefill_chunk_size=3),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=str,
)
def test_ways_of_decoding_agree(model, batch, how):
    one = alone(batch, 0)
    assert torch.equal(answers(model, one, **how), answers(model, one))


def test_an_assistant_changes_nothing(model, batch):
    one, assistant = alone(batch, 0), copy.deepcopy(model)
    assistant.get_output_embeddings().weight.data += 0.05
    assert torch.equal(answers(model, one, assistant_model=assistant), answers(model, one))


def test_processors_and_criteria_see_the_prompt(model, batch):
    seen = []

    class Listen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids)
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([len(row) >= prompt + 3 for row in input_ids])

    one = alone(batch, 0)
    prompt = one['input_ids'].shape[1]
    out = model.generate(**one, **GREEDY, logits_processor=[Listen()], stopping_criteria=[Stop()])
    assert out.shape[1] == prompt + 3 and all(torch.equal(ids[:, :prompt], one['input_ids']) for ids in seen)


def test_embeddings_with_images(model, batch):
    one, table = alone(batch, 0), model.get_input_embeddings()
    embeds = table(one['input_ids'].clamp(max=table.num_embeddings - 1))
    found = model.generate(**one, inputs_embeds=embeds, **GREEDY)[:, one['input_ids'].shape[1] :]
    assert torch.equal(found, answers(model, one))


def test_a_prompt_of_embeddings_alone(model, batch):
    ids = torch.tensor([[1, 10, 11, 12]])
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY)[:, 4:])


def test_outputs(model, batch):
    labels = batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)
    labels[:, :3] = -100
    out = model(**batch, labels=labels)
    assert out.logits.shape[:2] == out.last_hidden_state.shape[:2] == batch['input_ids'].shape
    torch.testing.assert_close(model.get_output_embeddings()(out.last_hidden_state), out.logits)
    loss, logits, *_ = model(**batch, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert out.past_key_values is not None and model(**batch, use_cache=False).past_key_values is None
    assert model(**batch, labels=labels, return_logits=False).logits is None


def test_image_features(model, batch):
    found = model.get_image_features(batch['pixel_values']).pooler_output
    assert len(found) == 2 and found.shape[-1] == model.config.text_config.hidden_size


def test_the_vocabulary_grows(model, batch):
    grown = copy.deepcopy(model)
    before, size = grown(**batch).logits, grown.config.text_config.vocab_size
    grown.resize_token_embeddings(size + 5)
    after = grown(**batch).logits
    assert after.shape[-1] == size + 5 == grown.config.text_config.vocab_size
    torch.testing.assert_close(after[..., :size], before)


def test_output_embeddings_can_be_set(model):
    own = copy.deepcopy(model)
    head = torch.nn.Linear(*reversed(own.get_output_embeddings().weight.shape), bias=False)
    own.set_output_embeddings(head)
    assert own.get_output_embeddings() is head


def test_auto_model(model):
    assert type(AutoModel.from_config(copy.deepcopy(model.config))) is type(model)


def test_attentions_of_every_layer(model, batch):
    own = copy.deepcopy(model)
    own.set_attn_implementation('eager')
    found = own(**batch, output_attentions=True).attentions
    assert len(found) == model.config.text_config.num_hidden_layers and all(a is not None for a in found)


def test_a_trainer_evaluates_arrays(model, batch, tmp_path):
    seen = {}

    def measure(predictions):
        seen.update(logits=predictions.predictions.shape, labels=predictions.label_ids.shape)
        return {}

    batch['labels'] = batch['input_ids'].masked_fill(batch['attention_mask'] == 0, -100)
    settings = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to='none', use_cpu=True)
    trainer = Trainer(model, settings, data_collator=lambda _: batch, eval_dataset=[{}, {}], compute_metrics=measure)
    trainer.evaluate()
    vocabulary = model.config.text_config.vocab_size
    assert seen == dict(logits=(*batch['labels'].shape, vocabulary), labels=tuple(batch['labels'].shape))
