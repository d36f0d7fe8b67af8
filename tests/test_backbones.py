"Published backbones: every paper's model on stand-ins of its own kinds of files, to the bit, in the right types, and trained a step."

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from standins import names_of, write_backbone, write_backbones, write_data
from transformers import AutoModelForCausalLM, CLIPModel, Dinov2Model, Pix2StructForConditionalGeneration
from transformers import SamModel, SiglipModel

from mllm_replica.core.registry import PAPERS, backbones_of, recipes_of
from mllm_replica.core.settings import project_root, settings
from mllm_replica.models import backbones
from mllm_replica.models.backbones import BACKBONES, FORMS, BackboneError, types_of
from mllm_replica.models.official import OfficialWeightsError
from mllm_replica.models.vision import resize_positions
from mllm_replica.owl2.released import encoder_from_clip
from mllm_replica.running import journal, unit

transformers.logging.set_verbosity_error()
ROWS = {  # paper -> rows that start from different models or in different ways: (table, row)
    'honeybee': [('6', 'honeybee_c_7b'), ('6', 'honeybee_d_13b')],
    'owl2': [('2', 'owl2'), ('5', 'nomam_text'), ('6', 'frozen')],
    'mm1': [('4', 'mm1_3b_chat'), ('1', 'clip_l_224_vecap'), ('4', 'mm1_3b_moe')],
    'eagle': [('6_released', 'eagle_x5_7b'), ('2', 'clip448_frozen'), ('8_released', 'eagle_x4_8b_plus_llama3_8b')],
    'owl3': [('4', 'owl3'), ('iclr1', 'owl3_1b'), ('10', 'base'), ('8', 'concat')],
}


@pytest.fixture(scope='module')
def standins(tmp_path_factory):
    "Stand-ins of all papers: hub id -> folder."
    root, found = tmp_path_factory.mktemp('backbones'), {}
    for paper in PAPERS:
        found |= write_backbones(paper, root / paper)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A project of its own, with the published tables; `place(folders)` names backbones in its settings.ini."
    root = tmp_path / 'project'
    root.mkdir()
    (root / 'papers').symlink_to(project_root() / 'papers', target_is_directory=True)
    text = (project_root() / 'settings.ini').read_text()

    def name(folders):
        lines = '\n'.join(f'{name} = {folder}' for name, folder in folders.items())
        (root / 'settings.ini').write_text(f'{text}\n{lines}\n')
        settings.cache_clear()
        return root

    monkeypatch.setenv('MLLM_REPLICA_ROOT', str(root))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for cached in project_root, settings:
        cached.cache_clear()
    name({})
    yield name
    for cached in project_root, settings:
        cached.cache_clear()


def recipe_of(paper, table, row):
    return recipes_of(paper).recipe(table, row, 'paper', 42)


def build(recipe):
    return recipes_of(recipe.paper).build(recipe)


def state_of(name, folder):
    "What a folder holds, by our keys: as transformers reads it, or (timm's file, the detector's) key by key as they are."
    form = BACKBONES[name].form
    if form in ('llama', 'qwen2'):
        return AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if form == 'convnext':
        state = load_file(f'{folder}/model.safetensors')
        return {key.replace('.gamma', '.weight'): t for key, t in state.items() if not key.startswith('head.')}
    if form == 'eva':
        state = torch.load(f'{folder}/eva02/det/eva02_L_coco_det_sys_o365.pth', weights_only=True)['model']
        return {key[13:]: t for key, t in state.items() if key.startswith('backbone.net.') and 'freqs' not in key}
    kind, part = {
        'clip': (CLIPModel, 'vision_model'),
        'siglip': (SiglipModel, 'vision_model'),
        'dinov2': (Dinov2Model, ''),
        'sam': (SamModel, 'vision_encoder'),
        'pix2struct': (Pix2StructForConditionalGeneration, 'encoder'),
    }[form]
    state = kind.from_pretrained(folder).get_submodule(part).state_dict()
    return {key: tensor for key, tensor in state.items() if not key.startswith(('neck.', 'head.'))}


def towers_of(model, recipe):
    "Backbone's name -> its tower in a model."
    names = backbones_of(recipe)
    found = {names['text']: model.language_model}
    if recipe.paper == 'eagle':
        for name, expert in zip(recipe.model['experts'], model.vision_model.vision_towers):
            found[names[name]] = expert.vision_tower['vision_model'] if name.startswith('clip') else expert.vision_tower
    elif recipe.paper != 'owl2':
        found[names['vision']] = model.vision_model
    return found


def own_key(key):
    "The published key of a part that was copied."
    return re.sub(r'\.multiway\.[01]', '', key)


CASES = [(paper, *row) for paper, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize('paper, table, row', CASES)
def test_towers_are_the_folders_to_the_bit_and_in_the_types_of_the_recipe(standins, place, paper, table, row):
    place(standins)
    recipe = recipe_of(paper, table, row)
    model, _ = build(recipe)
    assert {name: p.dtype for name, p in model.named_parameters()} == types_of(model, recipe.stages)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for name, tower in towers_of(model, recipe).items():
        published, seen = state_of(name, standins[name]), set()
        for key, ours in tower.state_dict().items():
            key = own_key(key)
            theirs = published.get(key)
            seen.add(key)
            if theirs is not None and ours.shape == theirs.shape:
                assert torch.equal(ours, theirs.to(ours.dtype)), (name, key)
        missing = published.keys() - seen
        if paper == 'mm1' and 'moe' in row:
            missing = {key for key in missing if '.mlp.' not in key}
        assert not missing, name


def test_the_encoder_of_owl2_is_clip_at_another_resolution_with_one_matrix(standins, place):
    place(standins)
    recipe = recipe_of('owl2', '6', 'frozen')
    model, _ = build(recipe)
    name = 'openai/clip-vit-large-patch14'
    clip, ours = CLIPModel.from_pretrained(standins[name]).vision_model, model.vision_model
    expected = encoder_from_clip(clip.state_dict(), 4, model.config.num_patches)
    assert expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in expected.items())
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():  # but for the norms' epsilon it is CLIP
        seen = ours(pixels).last_hidden_state
        theirs = clip.post_layernorm(clip(pixels, output_hidden_states=True).hidden_states[-1])
    assert torch.allclose(seen, theirs, atol=1e-3)


def test_both_ways_of_owl2_are_llama_and_text_is_read_as_by_llama(standins, place):
    place(standins)
    model, _ = build(recipe_of('owl2', '2', 'owl2'))
    layer = model.language_model.model.layers[0]
    for part in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.input_layernorm):
        text, visual = part.multiway
        assert torch.equal(text.weight, visual.weight) and text.weight is not visual.weight
    llama = AutoModelForCausalLM.from_pretrained(standins['meta-llama/Llama-2-7b-hf'], dtype=torch.float32)
    for norm in (part for name, part in llama.named_modules() if 'norm' in name):
        norm.variance_epsilon = 1e-6  # as in the released model
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.inference_mode():
        assert torch.allclose(model(input_ids=ids).logits, llama(ids).logits, atol=1e-5)


def test_image_layers_of_owl3_start_from_the_language_model(standins, place):
    place(standins)
    model, _ = build(recipe_of('owl3', '4', 'owl3'))
    assert model.config.hyper_layers == [0, 8, 16, 24]
    for i in model.config.hyper_layers:
        part = model.language_model.model.layers[i].self_attn
        key, value = part.v_kv_proj.weight.unflatten(0, (2, 2, 8)).unbind(1)
        assert torch.equal(key.flatten(0, 1), part.k_proj.weight) and torch.equal(
            value.flatten(0, 1), part.v_proj.weight
        )
    qwen = AutoModelForCausalLM.from_pretrained(standins['Qwen/Qwen2-7B-Instruct'], dtype=torch.float32)
    ids = torch.tensor([[20, 30, 40]])
    with torch.inference_mode():
        assert torch.allclose(model(input_ids=ids).logits, qwen(ids).logits, atol=1e-4)


def test_the_vocabulary_of_owl3_is_cut(standins, place, monkeypatch):
    place(standins)
    monkeypatch.setattr('mllm_replica.owl3.released.WORDS', 262)
    model, _ = build(recipe_of('owl3', '4', 'owl3'))
    table = AutoModelForCausalLM.from_pretrained(standins['Qwen/Qwen2-7B-Instruct']).get_input_embeddings().weight
    assert (
        torch.equal(model.get_input_embeddings().weight, table[:262].float())
        and model.config.text_config.vocab_size == 262
    )
    assert model.get_output_embeddings().weight.shape == (262, 32)


def test_tied_matrices_stay_one(standins, place):
    place(standins)
    model, _ = build(recipe_of('owl3', 'iclr1', 'owl3_1b'))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_experts_of_mm1_are_copies_of_the_filled_layer(standins, place):
    place(standins)
    model, _ = build(recipe_of('mm1', '4', 'mm1_3b_moe'))
    dense = AutoModelForCausalLM.from_pretrained(standins['princeton-nlp/Sheared-LLaMA-2.7B'])
    made, source = model.language_model.model.layers[1].mlp, dense.model.layers[1].mlp
    assert made.router.num_experts == 64 if hasattr(made.router, 'num_experts') else made.router.out_features == 64
    assert all(torch.equal(one, source.down_proj.weight.float()) for one in made.experts.down_proj)


def test_a_picture_of_another_size_interpolates_the_table(standins, place):
    place(standins)
    model, _ = build(recipe_of('mm1', '1', 'clip_l_224_vecap'))
    folder = standins['openai/clip-vit-large-patch14-336']
    table = CLIPModel.from_pretrained(folder).vision_model.embeddings.position_embedding.weight
    assert torch.equal(model.vision_model.embeddings.position_embedding.weight, resize_positions(table, 256, leading=1))


def test_connectors_are_drawn_from_the_seed(standins, place):
    place(standins)
    recipe = recipe_of('eagle', '6_released', 'eagle_x5_7b')
    first, again, other = (build(recipe.model_copy(update={'seed': seed}))[0] for seed in (1, 1, 2))
    for path in ('mm_projector.0.weight', 'vision_model.vision_towers.2.vision_tower.neck.conv1.weight'):
        one, two, three = (model.get_parameter(path) for model in (first, again, other))
        assert torch.equal(one, two) and not torch.equal(one, three) and one.std() > 0.01
    norm = first.vision_model.vision_towers[2].vision_tower['neck']['layer_norm1']
    assert torch.equal(norm.weight, torch.ones(4)) and torch.equal(norm.bias, torch.zeros(4))


def short(recipe):
    "One step of two samples for every stage, nothing asked."
    stages = tuple(
        stage.model_copy(update=dict(steps=1, batch_size=2, accumulate=1, warmup_steps=0)) for stage in recipe.stages
    )
    return recipe.model_copy(update=dict(stages=stages, benchmarks=()))


STEPS = [
    ('honeybee', '6', 'honeybee_c_7b'),
    pytest.param('honeybee', '6', 'honeybee_d_13b', marks=pytest.mark.nightly),
    ('owl2', '2', 'owl2'),
    pytest.param('owl2', '6', 'frozen', marks=pytest.mark.nightly),
    ('mm1', '4', 'mm1_3b_chat'),
    pytest.param('mm1', '4', 'mm1_7b_moe', marks=pytest.mark.nightly),
    ('owl3', '4', 'owl3'),
    ('owl3', '10', 'base'),
    pytest.param('owl3', '8', 'concat', marks=pytest.mark.nightly),
    pytest.param('owl3', '8', 'post_cross', marks=pytest.mark.nightly),
    ('eagle', '4', 'chan_concat_2'),
    pytest.param('eagle', '6_released', 'eagle_x5_7b', marks=pytest.mark.nightly),
    pytest.param('eagle', '5', 'cnx_frozen_pa', marks=pytest.mark.nightly),
    pytest.param('eagle', '8_released', 'eagle_x4_8b_plus_llama3_8b', marks=pytest.mark.nightly),
    pytest.param('eagle', '8_released', 'eagle_x5_34b_plus_yi_34b', marks=pytest.mark.nightly),
    pytest.param('eagle', '4', 'seq_append_2', marks=pytest.mark.nightly),
    pytest.param('eagle', '4', 'llava_hr_3', marks=pytest.mark.nightly),
]


@pytest.mark.parametrize('paper, table, row', STEPS)
def test_a_unit_of_the_paper_trains_a_step_of_each_stage(standins, place, tmp_path, monkeypatch, paper, table, row):
    root, recipe = place(standins), short(recipe_of(paper, table, row))
    write_data(recipe, root / 'data')
    monkeypatch.setattr(f'mllm_replica.{paper}.recipes.recipe', lambda *_: recipe)
    result = unit.run_unit(recipe, tmp_path / 'unit')
    assert result.steps == len(recipe.stages)
    losses = [float(line.split(',')[2]) for line in (tmp_path / 'unit' / 'curve.csv').read_text().splitlines()[1:]]
    assert len(losses) == result.steps and all(0 < loss < 20 for loss in losses)
