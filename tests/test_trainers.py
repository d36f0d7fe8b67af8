"TRL's trainer and the pipeline of transformers with all five models."

import pytest
import torch
from PIL import Image
from test_processing import KINDS, chat_tokenizer
from toys import model_of
from transformers import pipeline

from mllm_replica.core.registry import PAPERS
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.data.packing import collate

torch.set_num_threads(1)


@pytest.fixture(params=PAPERS)
def pair(request):
    "A model and its processor, with a row for the image token."
    model, owl3 = model_of(request.param), request.param == 'owl3'
    tokenizer = chat_tokenizer() if owl3 else byte_tokenizer()
    processor = KINDS[request.param].from_config(model.config, tokenizer, **({'placeholder': '9:'} if owl3 else {}))
    model.resize_token_embeddings(len(processor.tokenizer))
    return model, processor


def rows():
    colours = ('red', 'blue', 'green', 'black')
    content = [{'type': 'image'}, {'type': 'text', 'text': 'Which colour?'}]
    return [
        dict(
            images=[Image.new('RGB', (16, 16), colour)],
            messages=[
                {'role': 'user', 'content': content},
                {'role': 'assistant', 'content': [{'type': 'text', 'text': colour}]},
            ],
        )
        for colour in colours
    ]


def trained(model, processor, folder, dataset, **how):
    trl = pytest.importorskip('trl', reason="TRL is in the extra 'train'")
    settings = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy='no',
        use_cpu=True,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        **how.pop('settings', {}),
    )
    trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=processor, **how)
    trainer.train()
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


@pytest.mark.nightly
def test_sft_trainer_with_its_own_collator(pair, tmp_path):
    from datasets import Dataset

    losses = trained(*pair, tmp_path, Dataset.from_list(rows()))
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.nightly
def test_sft_trainer_with_a_collator_of_the_user(pair, tmp_path):
    from datasets import Dataset

    model, processor = pair
    turns = [{'from': 'human', 'value': '<image>Which colour?'}]

    def collator(batch):
        samples = [
            dict(id=row['colour'], images=[Image.new('RGB', (16, 16), row['colour'])])
            | {'conversations': [*turns, {'from': 'gpt', 'value': row['colour']}]}
            for row in batch
        ]
        encoded = [processor.encode(sample) for sample in samples]
        out = collate(encoded, processor.tokenizer.pad_token_id, image_tensor=processor.image_tensor)
        return {name: value for name, value in out.items() if name != 'ids'}

    dataset = Dataset.from_list([{'colour': colour} for colour in ('red', 'blue', 'green', 'black')])
    losses = trained(
        model,
        processor,
        tmp_path,
        dataset,
        data_collator=collator,
        settings=dict(remove_unused_columns=False, dataset_kwargs={'skip_prepare_dataset': True}),
    )
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_pipeline(pair):
    model, processor = pair
    ask = pipeline('image-text-to-text', model=model, processor=processor, device='cpu')
    said = [
        {
            'role': 'user',
            'content': [
                {'type': 'image', 'image': Image.new('RGB', (16, 16), 'red')},
                {'type': 'text', 'text': 'Which colour?'},
            ],
        }
    ]
    answer = ask(text=said, generate_kwargs=dict(max_new_tokens=3, do_sample=False), return_full_text=False)
    prompt = processor.apply_chat_template(
        said, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt'
    )
    ids = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt['input_ids'].shape[1] :]
    assert answer[0]['generated_text'] == processor.decode(ids)
