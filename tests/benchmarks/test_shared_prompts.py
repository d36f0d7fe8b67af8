"Four and sixteen questions on one picture of 576 visual tokens, beside the same questions each with its own."

import pytest
import torch
from PIL import Image
from timing import beside

from mllm_replica.data.language import byte_tokenizer
from mllm_replica.models.cost import count
from mllm_replica.models.vlm import VisionLanguageConfig, VisionLanguageModel, VisionLanguageProcessor
from mllm_replica.scoring.answering import answered

NEW = 4
ENCODER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
DECODER = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8)


@pytest.fixture(scope='module')
def pair():
    torch.manual_seed(0)
    special = dict(vocab_size=259, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    vision = ENCODER | dict(image_size=336, patch_size=14)
    model = VisionLanguageModel(VisionLanguageConfig(vision_config=vision, text_config=DECODER | special))
    return model, VisionLanguageProcessor.from_config(model.config, byte_tokenizer())


def asked(k):
    "Questions of 20 to 35 letters."
    picture = Image.linear_gradient('L')
    texts = [f'<image>What is at place {n}{"?" * (n + 1)}' for n in range(k)]
    return [
        dict(id=str(n), images=[picture], conversations=[{'from': 'human', 'value': text}])
        for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize('k', (4, 16))
def test_questions_on_one_picture(k, pair, judge):
    questions, found = asked(k), {}

    def answer(reuse):
        batches = answered(*pair, questions, max_new_tokens=NEW, batch_size=8, reuse=reuse)
        found[reuse] = dict(row for batch in batches for row in batch)
        return torch.zeros(())

    work = {reuse: count(lambda reuse=reuse: answer(reuse)).forward for reuse in (True, False)}
    share = work[True] / work[False]
    assert found[True] == found[False] and len(set(found[True].values())) > 1
    judge(
        f'{k} questions, shared ÷ not',
        lambda: beside(lambda: answer(True), lambda: answer(False), 3),
        share + 0.1,  # the rest goes into copies of keys and values
        work=share,
    )
