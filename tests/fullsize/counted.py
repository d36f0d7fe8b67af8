"FLOPs at the published sizes that claims are judged by (`counted` in the tables), on tensors that hold no data."

import torch

from mllm_replica.core.registry import recipes_of
from mllm_replica.models.configuration import visual_token_count
from mllm_replica.models.cost import as_fake, count
from mllm_replica.owl3.media import Media, Sight
from mllm_replica.planning.plan import mean_length, stage_cost

PLACEHOLDER, QUESTION, PATCHES = 5, 64, 729  # text tokens an image takes and a question has; patches of 384 pixels


def pflop_per_step(paper, table, row):
    "Of the first stage, forward and backward."
    chapter = recipes_of(paper)
    recipe = chapter.recipe(table, row, 'paper', 0)
    stage = recipe.stages[0]
    with torch.device('meta'):
        visual = visual_token_count(chapter.build(recipe)[0].config)
    length = mean_length(recipe, stage, visual)
    cost = stage_cost(lambda: chapter.build(recipe)[0], stage, length, 1)[0]
    return (cost.forward + cost.backward) * stage.batch_size / 1e15


def _seen(model, images, features):
    "Media and sight of a prompt: every placeholder sees the images before it, the question all of them."
    media = Media(model.visual_embeds(None, features), [[i * PLACEHOLDER for i in range(images)]])
    media.rotary(model.get_decoder().rotary_emb)
    counts = [i for i in range(images) for _ in range(PLACEHOLDER)] + [images] * QUESTION
    runs = [(0, i * PLACEHOLDER, (i + 1) * PLACEHOLDER, i) for i in range(images)]
    runs.append((0, images * PLACEHOLDER, len(counts), images))
    return {'sight': Sight(media, torch.tensor([counts]), runs)}, len(counts)


def tflop_to_first_token(table, row, images):
    "Encoder and language model, self-attention below its diagonal, one row of logits."
    chapter = recipes_of('owl3')
    with torch.device('meta'):
        model = chapter.build(chapter.recipe(table, row, 'paper', 0))[0].eval()
    text = model.config.get_text_config()
    with as_fake(model, torch.bfloat16), torch.no_grad():
        encoder = count(lambda: model.visual_features(model.blank_pixels(1))).forward
        features = model.visual_features(model.blank_pixels(images))
        beside, length = {}, images * PATCHES + QUESTION
        if row != 'concat':
            beside, length = _seen(model, images, features)
        embeds = torch.zeros(1, length, text.hidden_size, dtype=torch.bfloat16)
        step = super(type(model), model).forward
        total = count(lambda: step(inputs_embeds=embeds, use_cache=False, logits_to_keep=1, **beside).logits).forward
        project = count(lambda: model.visual_embeds(None, features)).forward
    above = 2 * length**2 * text.hidden_size * text.num_hidden_layers
    return (images * encoder + project + total - above) / 1e12
