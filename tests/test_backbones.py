"Published backbones: every paper's model on stand-ins of its own kinds of files, to the bit, in the right types, and trained a step."

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from accelerate import init_empty_weights
from shipped import made
from standins import names_of, write_backbone, write_backbones, write_data
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Model,
    LlamaConfig,
    Pix2StructForConditionalGeneration,
    SamModel,
    SiglipModel,
)
from typer.testing import CliRunner

from mllm_replica.cli import app

from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Benchmark, Lora, Recipe, Source, Stage
from mllm_replica.core.registry import PAPERS, backbones_of, recipes_of
from mllm_replica.core.settings import project_root, settings
from mllm_replica.evaluating.rows import evaluate_row
from mllm_replica.models import backbones
from mllm_replica.models.assembly import as_stored, types_of
from mllm_replica.models.backbones import BACKBONES, FORMS, BackboneError
from mllm_replica.models.official import OfficialWeightsError
from mllm_replica.models.vision import resize_positions
from mllm_replica.owl2.released import encoder_from_clip
from mllm_replica.planning.doctor import published_models, stored_data
from mllm_replica.running import journal, unit
from mllm_replica.training.adapters import adapters
from mllm_replica.training.identity import check_stages
from mllm_replica.training.tiny import DECODER

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


@pytest.mark.parametrize('paper, table, row', CASES)
def test_a_model_of_mapped_files_is_the_same_once_it_has_its_types(standins, place, paper, table, row):
    "What processes share out."
    place(standins)
    recipe = recipe_of(paper, table, row)
    model = build(recipe)[0]
    with as_stored():
        mapped = build(recipe)[0]
    assert any(p.dtype == torch.float16 for p in mapped.parameters())
    for (name, ours), (again, theirs) in zip(model.named_parameters(), mapped.named_parameters(), strict=True):
        assert name == again and torch.equal(ours, theirs.to(ours.dtype)), name


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


# --- scale small: encoders that are not CLIP ------------------------------------------------------------------------------
FUSED = ('seq_append', 'chan_concat', 'llava_hr', 'mini_gemini', 'deform')
DINO, WORDS, LITE = 'facebook/dinov2-small', 'HuggingFaceTB/SmolLM2-135M-Instruct', 'efficientnet-lite0'
SMALL = {  # case -> paper, its own settings, what its first stage trains
    'honeybee': (
        'honeybee',
        dict(connector=dict(projector_type='c-abs', num_query_tokens=4, hidden_size=16, depth=1), feature_layer=-2),
        r'^abstractor\.',
    ),
    'owl2': (
        'owl2',
        dict(
            abstractor=dict(
                num_learnable_queries=4,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
            )
        ),
        r'^visual_abstractor\.',
    ),
    'mm1': ('mm1', dict(connector=dict(connector_type='avg', num_query_tokens=4)), r'^connector\.'),
    'owl3': ('owl3', dict(fusion='hyper', hyper_layers=[1]), r'^vision2text_model\.|v_kv_proj|gate'),
    'owl3_concat': ('owl3', dict(fusion='concat'), r'^connector\.'),
    'eagle': (
        'eagle',
        dict(
            experts=['dinov2', 'lite'],
            settings={'lite': {'stages': 3}},
            sizes={'lite': 50},
            connector=dict(fusion='channel', grid=2),
        ),
        r'^mm_projector\.',
    ),
}


def small_recipe(case, **stage):
    "Two steps on random numbers of the true classes, at 56 pixels."
    paper, model, trainable = SMALL[case]
    eyes = {'dinov2': DINO, 'lite': LITE} if paper == 'eagle' else {'vision': DINO}
    first = dict(name='project', trainable=(trainable,), mixture={'a': 1.0}, steps=1, batch_size=2, lr=1e-2)
    how = dict(precision='bf16', max_length=300)
    return Recipe(
        paper=paper,
        table='none',
        row=case,
        scale='small',
        seed=1,
        model=model | dict(backbones=eyes | {'text': WORDS}, image_size=56),
        sources={'a': Source(kind='world', name='mosaics', size=4), 'b': Source(kind='world', name='mosaics', size=2)},
        stages=(Stage(**first, **how), Stage(**first | {'name': 'tune'}, **how, **stage)),
        benchmarks=(Benchmark(name='asked', source='b', max_new_tokens=2, batch_size=2),),
    )


@pytest.fixture(scope='module')
def small_standins(tmp_path_factory):
    root = tmp_path_factory.mktemp('small')
    for name in (DINO, WORDS, LITE):
        write_backbone(name, root / name.replace('/', '--'))
    return {name: str(root / name.replace('/', '--')) for name in (DINO, WORDS, LITE)}


CASES_OF_SMALL = [
    case if case in ('owl2', 'eagle') else pytest.param(case, marks=pytest.mark.nightly) for case in SMALL
]


def run_small(recipe, place, small_standins, folder, monkeypatch):
    "The unit, run."
    place(small_standins)
    monkeypatch.setattr(f'mllm_replica.{recipe.paper}.recipes.recipe', lambda *_: recipe)
    monkeypatch.setattr(f'mllm_replica.{recipe.paper}.recipes.measure', lambda *_: {})
    assert backbones_of(recipe) == recipe.model['backbones']
    made = unit.open_unit(recipe.paper, recipe.table, recipe.row, recipe.scale, recipe.seed, str(folder))
    for step in (unit.load, unit.encode, unit.cache_features, unit.fit, unit.score):
        step(made)
    return made


@pytest.mark.parametrize('case', CASES_OF_SMALL)
def test_every_paper_learns_with_dinov2_and_smollm2(small_standins, place, tmp_path, monkeypatch, case):
    "Features computed once, a step of each stage, an answer in mixed types, a folder that is the model."
    recipe = small_recipe(case)
    made = run_small(recipe, place, small_standins, tmp_path / 'unit', monkeypatch)
    model, pictures = made.model, made.processor.image_processor
    assert made.history.steps == 2 and made.metrics['asked'].n == 2
    assert made.features is not None and len(made.features) > 0
    assert pictures.side == 56 and (recipe.paper == 'eagle' or pictures.image_mean == [0.485, 0.456, 0.406])
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        sample = made.sources['a'][0]
        seen = model.visual_features(made.processor.image_tensor(sample['images']))
        stored = made.features[made.encoded['a'][0].image_ids]
    torch.testing.assert_close(seen.float(), stored, rtol=2e-2, atol=2e-2)
    again = type(model).from_pretrained(tmp_path / 'unit' / 'model' / 'tune', dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in model.state_dict().items())
    with torch.device('meta'):
        assert type(build(recipe)[0]) is type(model)


PLAIN = {'honeybee': dict(style='plain')}  # case -> settings of a processor that says no word of its own


@pytest.mark.parametrize('case', PLAIN)
def test_a_drawn_decoder_learns_behind_dinov2(small_standins, place, tmp_path, monkeypatch, case):
    "It knows the world's words, starts from the seed alone, and learns with what the paper puts before it."
    recipe = small_recipe(case)
    eyes = {part: name for part, name in recipe.model['backbones'].items() if part != 'text'}
    drawn = recipe.model | dict(backbones=eyes, text=DECODER, processor=PLAIN[case])
    stage = recipe.stages[0].model_copy(update=dict(trainable=(r'^language_model\.',), precision='fp32'))
    recipe = recipe.model_copy(update=dict(scale='sighted', model=drawn, stages=(stage,)))
    place(small_standins)
    first, again, other = (
        build(recipe.model_copy(update=dict(seed=seed)))[0].language_model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first['lm_head.weight'], other['lm_head.weight'])
    made = run_small(recipe, place, small_standins, tmp_path / 'unit', monkeypatch)
    assert made.metrics['asked'].n == 2
    changed = made.model.language_model.state_dict()
    assert all(not torch.equal(changed[name], first[name]) for name in first if '_proj' in name)


@pytest.mark.parametrize('case', CASES_OF_SMALL)
def test_adapters_learn_and_are_gone_into_the_weights(small_standins, place, tmp_path, monkeypatch, case):
    pytest.importorskip('peft', reason="peft is not installed: `pip install '.[train]'`")
    place(small_standins)
    before = build(small_recipe(case))[0].language_model.state_dict()
    recipe = small_recipe(case, lora=Lora(rank=2))
    made = run_small(recipe, place, small_standins, tmp_path / 'unit', monkeypatch)
    after = made.model.language_model.state_dict()
    assert list(after) == list(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    maps = {name for name in changed if re.search(r'(q|k|v|o|gate|up|down)_proj\.', name)}
    assert maps and all(re.search(SMALL[case][2], f'language_model.{name}') for name in changed - maps)
    again = type(made.model).from_pretrained(tmp_path / 'unit' / 'model' / 'tune', dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in made.model.state_dict().items())


def test_dinov2_at_another_size_has_the_table_that_its_class_would_make(small_standins, place):
    place(small_standins)
    model, _ = build(small_recipe('honeybee'))
    theirs = Dinov2Model.from_pretrained(small_standins[DINO]).eval()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        seen = model.vision_model.float().eval()
        torch.testing.assert_close(model.visual_features(pixels), expected, rtol=2e-2, atol=2e-2)
        table = theirs.embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 16), 56, 56)
    torch.testing.assert_close(seen.embeddings.position_embeddings, table.bfloat16().float())


def test_an_expert_has_the_weights_of_its_folder_but_for_head_and_stages_not_built(small_standins, place):
    place(small_standins)
    tower = build(small_recipe('eagle'))[0].vision_model.vision_towers[1]
    stored = load_file(f'{small_standins[LITE]}/model.safetensors')
    assert len(tower.vision_tower['_blocks']) == 5 and tower.grid == 7 and tower.channels == 40
    for key, ours in tower.vision_tower.state_dict().items():
        assert torch.equal(ours.float(), stored[key].to(ours.dtype).float()), key


# --- scale sighted: real experts before a drawn decoder ---------------------------------------------------------------
@pytest.mark.parametrize('row, places', [('chan_concat_2', 64), ('seq_append_2', 128), ('mini_gemini_2', 64)])
def test_kept_maps_of_frozen_experts_are_as_good_as_pictures(small_standins, place, row, places):
    place(small_standins)
    words = {'a': Source(kind='world', name='shelves', size=4)}  # the cut-outs may not be here
    recipe = recipes_of('eagle').recipe('4', row, 'sighted', 1).model_copy(update={'sources': words})
    model, processor = build(recipe)
    model.eval()
    assert unit.encoder_is_frozen(model, recipe) and recipes_of('eagle').starts(recipe) == []
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.visual_token_count() == processor.visual_tokens == places
    pixels = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        kept = model.visual_features(pixels)
        assert kept.shape == (2, 1, 64 * sum(tower.channels for tower in model.vision_model.vision_towers))
        torch.testing.assert_close(model.visual_embeds(image_features=kept), model.visual_embeds(pixels))


def test_rows_without_real_experts_say_why():
    eagle = recipes_of('eagle')
    reasons = {row: why for table in ('4', 'fig4') for row, why in eagle.rows(table, 'sighted').items() if why}
    assert set(reasons) == {'llava_hr_2'} | {f'{fusion}_3' for fusion in FUSED} | {'x5', 'x6'}
    assert 'inside the first expert' in reasons['llava_hr_2'] and 'four real experts' in reasons['x6']
    one, other = (eagle.recipe(*at, 'sighted', 3) for at in (('4', 'chan_concat_2'), ('fig4', 'x2')))
    assert one.digest() == other.digest()


def test_adapters_without_peft_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match='pip install'), adapters(torch.nn.Module(), [tuned_stage()], 0):
        pass


def test_adapters_of_nothing_and_in_shares_are_refused(small_standins, place):
    place(small_standins)
    model, _ = build(small_recipe('mm1'))
    stage = tuned_stage()
    with pytest.raises(NotImplementedError, match="'tune' trains adapters, which are not shared out"):
        check_stages(model, [stage], {'a': [1, 2]}, Machine(devices=2, shard='fsdp'), 2)
    pytest.importorskip('peft')
    nothing = stage.model_copy(update={'lora': Lora(targets='nothing')})
    with pytest.raises(ValueError, match="'nothing' matches no linear map"), adapters(model, [nothing], 0):
        pass


def tuned_stage():
    return small_recipe('mm1', lora=Lora()).stages[1]


def test_stages_without_adapters_are_dumped_as_before():
    bare, tuned = small_recipe('honeybee'), small_recipe('honeybee', lora=Lora())
    assert 'lora' not in json.dumps(bare.model_dump(mode='json')) and bare.digest() != tuned.digest()
    assert Recipe.model_validate_json(tuned.model_dump_json()) == tuned and tuned.stages[1].lora.rank == 8


def test_connectors_are_drawn_from_the_seed(standins, place):
    place(standins)
    recipe = recipe_of('eagle', '6_released', 'eagle_x5_7b')
    first, again, other = (build(recipe.model_copy(update={'seed': seed}))[0] for seed in (1, 1, 2))
    for path in ('mm_projector.0.weight', 'vision_model.vision_towers.2.vision_tower.neck.conv1.weight'):
        one, two, three = (model.get_parameter(path) for model in (first, again, other))
        assert torch.equal(one, two) and not torch.equal(one, three) and one.std() > 0.01
    norm = first.vision_model.vision_towers[2].vision_tower['neck']['layer_norm1']
    assert torch.equal(norm.weight, torch.ones(4)) and torch.equal(norm.bias, torch.zeros(4))


def short(recipe, steps=1, **changes):
    "A step or more of two samples for every stage, nothing asked."
    changes |= dict(steps=steps, batch_size=2, accumulate=1, warmup_steps=0)
    stages = tuple(stage.model_copy(update=changes) for stage in recipe.stages)
    return recipe.model_copy(update=dict(stages=stages, benchmarks=()))


STEPS = [
    ('honeybee', '6', 'honeybee_c_7b'),
    pytest.param('honeybee', '6', 'honeybee_d_13b', marks=pytest.mark.nightly),
    ('owl2', '2', 'owl2'),
    pytest.param('owl2', '6', 'frozen', marks=pytest.mark.nightly),
    pytest.param('mm1', '4', 'mm1_3b_chat', marks=pytest.mark.nightly),
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


@pytest.mark.nightly
@pytest.mark.parametrize(
    'paper, table, row, column', [('honeybee', '6', 'honeybee_c_7b', 'mme_p'), ('owl2', '2', 'owl2', 'mme')]
)
def test_the_folder_of_a_trained_unit_is_asked_like_a_released_one(
    standins, place, tmp_path, monkeypatch, paper, table, row, column
):
    root, recipe = place(standins), short(recipe_of(paper, table, row))
    write_data(recipe, root / 'data')
    monkeypatch.setattr(f'mllm_replica.{paper}.recipes.recipe', lambda *_: recipe)
    unit.run_unit(recipe, tmp_path / 'unit')
    made('mme', tmp_path / 'asked' / 'mme')
    folder = tmp_path / 'unit' / 'model' / recipe.stages[-1].name
    done = evaluate_row(paper, table, row, folder, data=tmp_path / 'asked', columns=[column])
    (cell,) = [cell for cell in done.cells if cell.column == column]
    assert 0 <= cell.evaluated <= 2000 and (cell.questions, cell.official) == (28, 2374) and done.results.is_file()


@pytest.mark.nightly
@pytest.mark.parametrize('paper, table, row', STEPS)
def test_a_unit_of_the_paper_trains_in_shares(standins, place, tmp_path, monkeypatch, paper, table, row):
    "Two processes with a share of the model each give the losses of one, and leave a folder for every stage."
    in_shares(place(standins), tmp_path, monkeypatch, short(recipe_of(paper, table, row)), rtol=2e-2, atol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize('paper, table, row', [case for case in STEPS if type(case) is tuple])
def test_in_fp32_shares_give_the_losses_of_one_process(standins, place, tmp_path, monkeypatch, paper, table, row):
    "Three steps of every stage, on towers of the published classes."
    recipe = short(recipe_of(paper, table, row), 3, precision='fp32')
    in_shares(place(standins), tmp_path, monkeypatch, recipe, rtol=1e-5, atol=1e-6)


def in_shares(root, tmp_path, monkeypatch, recipe, **close):
    paper, losses = recipe.paper, []
    write_data(recipe, root / 'data', samples=200 if paper == 'mm1' else 8)
    monkeypatch.setattr(f'mllm_replica.{paper}.recipes.recipe', lambda *_: recipe)
    for machine in ('{}', '{"devices": 2, "shard": "fsdp"}'):
        monkeypatch.setenv('MLLM_REPLICA_MACHINE', machine)
        settings.cache_clear()
        folder = tmp_path / f'unit{len(losses)}'
        assert unit.run_unit(recipe, folder).steps == sum(stage.steps for stage in recipe.stages)
        losses.append([float(line.split(',')[2]) for line in (folder / 'curve.csv').read_text().splitlines()[1:]])
    torch.testing.assert_close(*map(torch.tensor, losses), **close)
    assert {path.name for path in (folder / 'model').iterdir()} == {stage.name for stage in recipe.stages}


# --- what is missing or wrong is named ------------------------------------------------------------------------------------
LLAMA, CLIP, EVA = 'meta-llama/Llama-2-7b-hf', 'openai/clip-vit-large-patch14', 'Yuxin-CV/EVA-02'


def empty_llama(folder):
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def changed_weights(change):
    "A change of a folder: its state dict as `change` leaves it."

    def apply(folder):
        state = load_file(folder / 'model.safetensors')
        change(state)
        save_file(state, folder / 'model.safetensors', {'format': 'pt'})

    return apply


def as_bin(content):
    "A change of a folder: one .bin with this in place of its weights."

    def apply(folder):
        (folder / 'model.safetensors').unlink()
        torch.save(content, folder / 'pytorch_model.bin')

    return apply


def torn(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])


def half_fetched(folder):
    places = {'model.norm.weight': 'model-00002-of-00002.safetensors'}
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))


def widened(state):
    state['model.norm.weight'] = torch.ones(33)


class Harmful:
    def __reduce__(self):
        return print, ('this ran',)


FAULTS = [
    (changed_weights(lambda state: state.pop('model.norm.weight')), r'missing +model.norm.weight \[32\]'),
    (changed_weights(lambda state: state.update(extra=torch.zeros(2))), r'unexpected +extra \[2\]'),
    (changed_weights(widened), r'wrong shape model.norm.weight: found \[33\], expected \[32\]'),
    (torn, 'cannot be read'),
    (half_fetched, 'model-00002-of-00002.safetensors'),
    (as_bin(Harmful()), 'pytorch_model.bin'),
    (as_bin([torch.zeros(2)]), 'expected tensors by name'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'no model.safetensors'),
    (lambda folder: (folder / 'config.json').unlink(), 'no config.json'),
    (lambda folder: (folder / 'config.json').write_text('{"model_type": '), 'config.json is damaged'),
    (lambda folder: (folder / 'config.json').write_text('[]'), 'holds no object'),
]


@pytest.mark.parametrize('spoil, said', FAULTS)
def test_a_folder_that_does_not_fit_fills_nothing(standins, place, tmp_path, capsys, spoil, said):
    folder = tmp_path / 'llama'
    shutil.copytree(standins[LLAMA], folder)
    place({LLAMA: folder})
    tower = empty_llama(folder)
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=said):
        backbones.load_backbone(LLAMA, tower)
    assert all(parameter.is_meta for parameter in tower.parameters()) and 'this ran' not in capsys.readouterr().out


def test_every_key_that_does_not_fit_is_named_with_backbone_and_folder(standins, place, tmp_path):
    folder = tmp_path / 'llama'
    shutil.copytree(standins[LLAMA], folder)
    tower = empty_llama(folder)

    def change(state):
        for i in range(4):
            del state[f'model.layers.{i}.self_attn.q_proj.weight']

    changed_weights(change)(folder)
    place({LLAMA: folder})
    with pytest.raises(OfficialWeightsError, match=f'backbone {LLAMA} in {folder}: 4 keys do not fit') as error:
        backbones.load_backbone(LLAMA, tower)
    assert all(f'layers.{i}.self_attn.q_proj' in str(error.value) for i in range(4))


def test_a_name_without_folder_says_where_was_looked_and_what_to_write(place):
    with pytest.raises(BackboneError, match=rf'write `{CLIP} = FOLDER` into \[backbones\]'):
        build(recipe_of('owl2', '2', 'owl2'))
    root = place({CLIP: 'models/clip', LLAMA: 'models/llama'})
    with pytest.raises(BackboneError, match=f'{root}/models/clip, which is no folder'):
        build(recipe_of('owl2', '2', 'owl2'))


def test_a_folder_is_relative_to_the_project(standins, place):
    root = place({CLIP: 'models/clip', LLAMA: 'models/llama'})
    for name, own in ((CLIP, 'clip'), (LLAMA, 'llama')):
        shutil.copytree(standins[name], root / 'models' / own)
    assert build(recipe_of('owl2', '2', 'owl2'))[0].config.text_config.hidden_size == 32


def test_another_kind_of_model_is_refused(standins, place):
    place({CLIP: standins['google/siglip-so400m-patch14-384'], LLAMA: standins[LLAMA]})
    with pytest.raises(BackboneError, match='holds a siglip, expected what CLIPVisionModel is made of'):
        build(recipe_of('owl2', '2', 'owl2'))


def test_the_detector_is_found_by_its_name_and_missed_by_it(standins, place, tmp_path):
    place(standins)
    (file,) = backbones.backbone_files(EVA)
    assert file.name == 'eva02_L_coco_det_sys_o365.pth'
    (tmp_path / 'bare').mkdir()
    shutil.copy(file, tmp_path / 'bare')
    place({EVA: tmp_path / 'bare'})
    assert backbones.backbone_files(EVA) and backbones.backbone_settings(EVA) == {}
    (tmp_path / 'bare' / file.name).unlink()
    with pytest.raises(BackboneError, match='no eva02_L_coco_det_sys_o365.pth'):
        backbones.backbone_files(EVA)


def test_a_language_model_without_tokenizer(standins, place, tmp_path):
    folder = tmp_path / 'llama'
    shutil.copytree(standins[LLAMA], folder, ignore=shutil.ignore_patterns('tokenizer*'))
    place({LLAMA: folder})
    with pytest.raises(BackboneError, match=f'no tokenizer in {folder}'):
        backbones.backbone_tokenizer(LLAMA)


def test_a_clip_without_its_text_half_is_a_clip_too(standins, place, tmp_path):
    place(standins)
    whole = CLIPModel.from_pretrained(standins[CLIP]).vision_model
    CLIPVisionModel(whole.config).save_pretrained(tmp_path)
    state = load_file(f'{standins[CLIP]}/model.safetensors')
    place({CLIP: tmp_path})
    half = {key: tensor for key, tensor in state.items() if key.startswith('vision_model.')}
    half['vision_model.embeddings.position_ids'] = torch.arange(257)[None]  # as older files have it
    save_file(half, tmp_path / 'model.safetensors')
    with init_empty_weights(include_buffers=False):
        tower = CLIPVisionModel(backbones.backbone_config(CLIP))
    backbones.load_backbone(CLIP, tower, torch.bfloat16)
    assert all(torch.equal(t, whole.state_dict()[key].bfloat16()) for key, t in tower.state_dict().items())


def test_qwen_is_a_qwen2(place, tmp_path):
    name, words = 'Qwen/Qwen-7B', 'transformer.wte.weight'
    write_backbone(name, tmp_path / 'qwen')
    place({name: tmp_path / 'qwen'})
    config = backbones.backbone_config(name)
    assert (config.intermediate_size, config.num_key_value_heads, config.hidden_size) == (48, 4, 32)
    with init_empty_weights(include_buffers=False):
        tower = AutoModelForCausalLM.from_config(config)
    backbones.load_backbone(name, tower)
    state = load_file(tmp_path / 'qwen' / 'model.safetensors')
    parts = [getattr(tower.model.layers[1].self_attn, f'{part}_proj').weight for part in 'qkv']
    assert torch.equal(torch.cat(parts), state['transformer.h.1.attn.c_attn.weight'].float())
    assert torch.equal(tower.model.embed_tokens.weight, state[words].float())
    assert tower(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_name_that_is_not_in_the_table_is_read_as_what_it_is(standins, place):
    place({'org/own-llama': standins[LLAMA], 'org/own-clip': standins[CLIP]})
    assert backbones.backbone_config('org/own-llama').model_type == 'llama'
    assert backbones.backbone_config('org/own-clip').model_type == 'clip_vision_model'


def test_all_that_recipes_name_is_in_the_table():
    names = {name for paper in PAPERS for name in names_of(paper)}
    assert names <= BACKBONES.keys() and {BACKBONES[name].form for name in names} <= FORMS.keys()


def test_the_key_of_a_unit_names_the_folders(standins, place, tmp_path):
    recipe = recipe_of('owl2', '2', 'owl2').model_copy(update=dict(sources={}, stages=()))
    place({CLIP: standins[CLIP], LLAMA: standins[LLAMA]})
    before = journal.data_hash(recipe)
    place({CLIP: standins[CLIP]})
    assert journal.data_hash(recipe) != before
    shutil.copytree(standins[LLAMA], tmp_path / 'other')
    place({CLIP: standins[CLIP], LLAMA: tmp_path / 'other'})
    assert journal.data_hash(recipe) != before


MEMORY = """
import resource, sys, torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from mllm_replica.models import backbones
name = sys.argv[1]
with init_empty_weights(include_buffers=False):
    tower = AutoModelForCausalLM.from_config(backbones.backbone_config(name))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
backbones.load_backbone(name, tower)
size = sum(p.nbytes for p in tower.parameters()) / 1024
print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.nightly
@pytest.mark.parametrize('form', ['safetensors', 'bin'])
def test_no_second_copy_of_the_state_is_held(place, tmp_path, form):
    sizes = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=8, vocab_size=16000
    )
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / 'llama')
    if form == 'bin':
        as_bin(model.state_dict())(tmp_path / 'llama')
    place({LLAMA: tmp_path / 'llama'})
    done = subprocess.run([sys.executable, '-c', MEMORY, LLAMA], capture_output=True, text=True, check=True)
    size, grown = map(float, done.stdout.split()[-2:])
    assert size > 1.5e6 and grown < size + 2 * 2**28 / 1024 + 1e5  # KiB


SHARED = """
import re, sys, threading, time, torch
from accelerate import Accelerator, init_empty_weights
from transformers import AutoModelForCausalLM
from mllm_replica.core.machine import Machine
from mllm_replica.core.recipe import Stage
from mllm_replica.models import backbones
from mllm_replica.training.sharding import mesh_of, shard

def own():
    return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024

def watch():
    while True:
        peak[0] = max(peak[0], own())
        time.sleep(0.002)

process = Accelerator().process_index
with init_empty_weights(include_buffers=False):
    tower = AutoModelForCausalLM.from_config(backbones.backbone_config(sys.argv[1]))
size = sum(4 * p.numel() for p in tower.parameters()) / 2**20
before, peak = own(), [0.0]
threading.Thread(target=watch, daemon=True).start()
backbones.load_backbone(sys.argv[1], tower, None)
mapped = peak[0] - before
stage = Stage(name='a', trainable=('.',), mixture={'a': 1.0}, steps=1, batch_size=2, lr=1e-3)
shard(tower, mesh_of(Machine(devices=2, shard='fsdp'), 'cpu', 2), [stage])
if not process:
    print('FOUND', size, mapped, peak[0] - before)
torch.distributed.destroy_process_group()
"""


@pytest.mark.nightly
def test_a_process_holds_its_share_and_a_block_of_mapped_files(place, tmp_path):
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=8)
    config = LlamaConfig(**sizes, vocab_size=16000, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / 'llama')
    place({LLAMA: tmp_path / 'llama'})
    (tmp_path / 'shared.py').write_text(SHARED)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    places = os.environ | {'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([*torchrun, tmp_path / 'shared.py', LLAMA], capture_output=True, text=True, env=places)
    assert done.returncode == 0, done.stderr[-3000:]
    size, mapped, peak = map(float, done.stdout.split('FOUND')[1].split()[:3])
    assert size > 1500 and mapped < 100 and peak < size / 2 + 400, (size, mapped, peak)  # MB


# --- doctor ---------------------------------------------------------------------------------------------------------------
def doctor(*words):
    return CliRunner().invoke(app, ['doctor', *words])


def test_doctor_lists_all_that_is_missing_at_once(place):
    root, done = place({CLIP: 'nowhere'}), doctor('owl2', '7', '--scale', 'paper', '--row', 'q64')
    assert done.exit_code == 1
    recipe = recipe_of('owl2', '7', 'q64')
    for source in recipe.sources.values():
        assert f'data {source.name} (train)' in done.output
    assert f'{root}/nowhere, which is no folder' in done.output
    assert f'write `{LLAMA} = FOLDER` into [backbones]' in done.output and f'tokenizer of {LLAMA}' in done.output
    assert f'{len(recipe.sources) + 3} missing' in done.output
    for topic in ('disk', 'host memory', 'device memory'):
        assert topic in done.output


@pytest.mark.nightly  # the two tests around it say the rest in less time
@pytest.mark.parametrize('paper, table, row', [('owl2', '7', 'q64'), ('eagle', '4', 'chan_concat_2')])
def test_doctor_is_content_with_stand_ins(standins, place, paper, table, row):
    write_data(recipe_of(paper, table, row), place(standins) / 'data')
    done = doctor(paper, table, '--scale', 'paper', '--row', row)
    assert done.exit_code == 0 and 'all well' in done.output and 'fail' not in done.output


def test_doctor_names_a_tokenizer_that_alone_is_missing(standins, place, tmp_path):
    shutil.copytree(standins[LLAMA], tmp_path / 'llama', ignore=shutil.ignore_patterns('tokenizer*'))
    root = place(standins | {LLAMA: tmp_path / 'llama'})
    recipe = recipe_of('owl2', '7', 'q64')
    write_data(recipe, root / 'data')
    found = list(published_models([recipe]))
    assert [f.topic for f in found if f.state == 'fail'] == [f'tokenizer of {LLAMA}']
    assert 'tokenizer_config.json' in found[-1].advice
    assert {f.state for f in stored_data([recipe])} == {'ok'}


def test_doctor_wants_nothing_for_small_models_and_knows_names(place):
    assert doctor('owl2', '7', '--scale', 'tiny').exit_code == 0
    assert doctor('owl9').exit_code == 2 and doctor('owl2', '77', '--scale', 'paper').exit_code == 2
    assert doctor('owl2', '7', '--scale', 'paper', '--row', 'q65').exit_code == 2
