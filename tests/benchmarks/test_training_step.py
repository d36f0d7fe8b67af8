"A training step of the tiny model (Table 3's C-Abstractor, 144 tokens) beside the product at the same number of FLOPs."

import torch
from fullsize import MATMUL_FLOPS

from mllm_replica.data.packing import collate
from mllm_replica.data.sources import load_source
from mllm_replica.honeybee import recipes
from mllm_replica.models.cost import count
from mllm_replica.training.optimiser import freeze_all_but, make_optimizer, trainable_names

SHARE = 0.25  # of the product's rate, which a step must not fall below; 0.6 is aimed at


def test_share_of_the_matmul_rate(ratio, judge):
    recipe = recipes.recipe('3', 'cabs_144', 'tiny', 0)
    stage, (model, processor) = recipe.stages[0], recipes.build(recipe)
    shares = {'boards': 27, 'easy_vqa': 5}  # of a batch of 32, by the weights of the mixture
    sources = [recipe.sources[name].model_copy(update={'size': size}) for name, size in shares.items()]
    samples = [processor.encode(sample) for source in sources for sample in load_source(source, 0)]
    batch = collate(samples, processor.tokenizer.pad_token_id, image_tensor=processor.image_tensor)
    batch.pop('ids')
    batch['image_features'] = model.visual_features(
        batch.pop('pixel_values')
    ).detach()  # frozen: computed once in a run
    names = trainable_names(model, stage.trainable)
    freeze_all_but(model.train(), names)
    optimizer = make_optimizer(model, names, stage)

    def step():
        "As `train` does it, without its book-keeping."
        model(**batch, return_logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], stage.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    cost = count(lambda: model(**batch, return_logits=False).loss)
    optimizer.zero_grad(set_to_none=True)
    work = (cost.forward + cost.backward) / MATMUL_FLOPS
    judge('tiny training step', lambda: ratio(step, 10), work / SHARE, '', True, work=work)
