"A thousand questions with answers of one word: prompts of 37 tokens, a model of two layers of width 64."

from transformers import LlamaConfig, LlamaForCausalLM

from mllm_replica.core.recipe import Benchmark
from mllm_replica.data.encoded import Encoded
from mllm_replica.data.language import word_tokenizer
from mllm_replica.scoring.evaluation import evaluate


class Words:
    "A processor that asks everybody the same."

    def __init__(self):
        self.tokenizer = word_tokenizer(['what is it', *map(str, range(100))])

    def encode(self, sample, training=True):
        return Encoded(sample['id'], [1] + [4, 5, 6] * 12, [-100] * 37)

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class Thousand:
    "Calling it answers them all, in batches of a hundred."

    def __init__(self):
        self.processor = Words()
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config = LlamaConfig(vocab_size=len(self.processor.tokenizer), **sizes, **special)
        self.model = LlamaForCausalLM(config)
        self.samples = [dict(id=str(i), answer='it', task='') for i in range(1000)]
        self.bench = Benchmark(name='speed', source='x', max_new_tokens=2, batch_size=100)

    def __call__(self, path):
        return evaluate(self.model, self.processor, self.bench, self.samples, path)
