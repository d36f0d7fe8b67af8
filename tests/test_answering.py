"Answers do not depend on batches, order, processes, or on what questions on one picture share; memory stays flat."

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from toys import model_of

from mllm_replica.core.registry import PAPERS
from mllm_replica.data.language import byte_tokenizer
from mllm_replica.eagle.prompts import EagleProcessor
from mllm_replica.honeybee.model import HoneybeeProcessor
from mllm_replica.mm1.model import MM1Processor
from mllm_replica.owl2.processor import Owl2Processor
from mllm_replica.owl3.processor import Owl3Processor
from mllm_replica.scoring.answering import answered, beginning, plan
from mllm_replica.scoring.evaluation import collate_prompts, greedy

torch.set_num_threads(1)
KINDS = dict(honeybee=HoneybeeProcessor, owl2=Owl2Processor, mm1=MM1Processor, eagle=EagleProcessor, owl3=Owl3Processor)
CHATML = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')
NEW = 6


def picture(number, size=20):
    "The bytes of a picture of noise."
    noise = np.random.default_rng(number).integers(256, size=(size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, 'PNG')
    return dict(bytes=file.getvalue(), path=None)


def sample(id, text, *pictures):
    turns = [{'from': 'human', 'value': text}, {'from': 'gpt', 'value': ''}]
    return dict(id=id, images=[picture(n) for n in pictures], conversations=turns, document='', options=[], meta='{}')


def samples(counts, begin='<image>', pictures=1):
    "Questions of several lengths, so many on each picture."
    return [
        sample(f'{n}-{i}', f'{begin}Is it {"so " * (i * 7 % 5)}{i}?', *range(10 * n, 10 * n + pictures))
        for n, count in enumerate(counts)
        for i in range(count)
    ]


@pytest.fixture(scope='module', params=PAPERS)
def pair(request):
    "A model that says many things, and its processor."
    model = model_of(request.param)
    tokenizer = byte_tokenizer()
    if request.param == 'owl3':
        tokenizer.add_tokens([AddedToken(name, special=True) for name in CHATML])
    model.resize_token_embeddings(len(tokenizer))
    settings = dict(placeholder='9:') if request.param == 'owl3' else {}  # the ids that the toy model knows
    return model, KINDS[request.param].from_config(model.config, tokenizer, **settings)


def plainly(model, processor, asked):
    "Each question by itself."
    found = {}
    for one in asked:
        batch = collate_prompts([processor.encode(one, training=False)], processor)
        found[one['id']] = processor.decode(greedy(model, batch, NEW)[0]).strip()
    return found


def said(pair, asked, **how):
    found = [row for batch in answered(*pair, asked, max_new_tokens=NEW, **how) for row in batch]
    assert sorted(id for id, _ in found) == sorted(one['id'] for one in asked)
    return dict(found)


def test_tmp(pair):
    asked = samples([1, 4, 3, 4, 6])
    e = [pair[1].encode(a, training=False) for a in asked[1:5]]
    print(beginning(e), [len(x.input_ids) for x in e], e[0].image_spans)
    want = plainly(*pair, asked)
    print(want)
    for b in (1, 8):
        for reuse in (False, True):
            assert said(pair, asked, batch_size=b, reuse=reuse) == want
