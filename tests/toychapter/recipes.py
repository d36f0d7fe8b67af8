"Recipes whose units fail on purpose (table `faults`) or share an experiment (tables `first` and `second`)."

from mllm_replica.core.recipe import Benchmark, Recipe, Source, Stage

ROWS = {
    'faults': ['good', 'raises', 'exits', 'killed', 'hangs', 'late'],
    'first': ['wide', 'narrow', 'other'],
    'second': ['wide', 'deep'],
}


def rows(table, scale):
    return {row: 'needs a telescope' if row == 'other' else None for row in ROWS[table]}


def tables(scale):
    return list(ROWS)


def recipe(table, row, scale, seed):
    tiles = dict(kind='world', name='tiles', options={'grid': 2, 'colors': 3, 'tasks': ['cell'], 'pixels': 16})
    stage = Stage(
        name='joint', trainable=('connector', 'language_model'), mixture={'train': 1.0}, steps=3, batch_size=4, lr=1e-3
    )
    return Recipe(
        paper='mm1',
        table=table,
        row=row,
        scale=scale,
        seed=seed,
        model={'row': row},
        sources={'train': Source(**tiles, split='train', size=12), 'test': Source(**tiles, split='test', size=6)},
        stages=(stage,),
        benchmarks=(Benchmark(name='toy', source='test'),),
    )


def build(recipe):
    import torch
    from mllm_replica.data.language import word_tokenizer
    from mllm_replica.data.worlds.vocabulary import vocabulary
    from mllm_replica.models.configuration import VisionLanguageConfig
    from mllm_replica.models.vlm import VisionLanguageModel, VisionLanguageProcessor

    torch.manual_seed(recipe.seed)
    tokenizer = word_tokenizer(vocabulary())
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = VisionLanguageConfig(
        vision_config=dict(model_type='clip_vision_model', image_size=16, patch_size=8, **small),
        connector_config={},
        text_config=dict(model_type='llama', vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0, **small),
    )
    return VisionLanguageModel(config), VisionLanguageProcessor.from_config(config, tokenizer)


def measure(model, processor, recipe, scores):
    return {'size': float(sum(p.numel() for p in model.parameters()))}
