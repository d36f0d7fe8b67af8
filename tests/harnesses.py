"Tasks for lmms-eval and lm-eval in their true layout, made here: a few rows of pictures, videos and text."

import numpy as np
from PIL import Image


FUNCTIONS = """
def one(doc):
    return [doc['image'].convert('RGB')]


def several(doc):
    return list(doc['images'])


def film(doc):
    return [doc['film']]


def ask(doc):
    return doc['question']


def between(doc):
    said = [dict(type='text', text='Is'), dict(type='image', url=doc['images'][0]), dict(type='text', text='or')]
    return [dict(role='user', content=[*said, dict(type='image', url=doc['images'][1]), dict(type='text', text='larger?')])]


def score(doc, results):
    return dict(said=len(results[0]))


def mean(items):
    return sum(items) / len(items)
"""
HEAD = """
task: {name}
dataset_path: {kind}
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
TASK = (
    HEAD
    + """output_type: generate_until
doc_to_visual: {visual}
doc_to_text: {text}
doc_to_target: answer
process_results: !function tools.score
generation_kwargs:
  max_new_tokens: 6
  do_sample: false
metric_list:
  - metric: said
    aggregation: !function tools.mean
    higher_is_better: true
"""
)
CHOICE = (
    HEAD
    + """output_type: multiple_choice
{visual}doc_to_text: question
doc_to_choice: ["yes", "no", "certainly not"]
doc_to_target: "{{{{ ['yes', 'no'].index(answer) }}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
)
POPE = """
include: {official}
task: local_pope
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
"""


def pictures(count, side=20):
    "Noise on colours, no two alike."
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 80, (count, side, side + 4, 3), dtype=np.uint8)
    return [Image.fromarray(part + np.uint8(20 * n % 170)) for n, part in enumerate(noise)]


def write_film(path, frames=12):
    "A small mp4."
    import av

    with av.open(str(path), 'w') as out:
        stream = out.add_stream('mpeg4', rate=8)
        stream.width, stream.height = 32, 32
        for picture in pictures(frames, 32):
            out.mux(stream.encode(av.VideoFrame.from_image(picture.crop((0, 0, 32, 32)))))
        out.mux(stream.encode())


def write_tasks(folder, rows=7):
    "Tasks `local_one`, `local_many`, `local_between`, `local_film`, `local_text`, `local_choice`, and `local_pope` with the official scorer."
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    folder.mkdir(parents=True)
    (folder / 'tools.py').write_text(FUNCTIONS)
    shown = pictures(2 * rows)
    words = ['Is this ' + 'very ' * (n % 4) + 'large?' for n in range(rows)]
    plain = dict(
        question=words, answer=['yes', 'no'] * (rows // 2) + ['yes'] * (rows % 2), question_id=[*map(str, range(rows))]
    )
    text = dict.fromkeys(plain, Value('string'))
    picked = plain | dict(category=['random'] * rows, image=shown[:rows], image_source=['a'] * rows)
    Dataset.from_dict(
        picked, Features(text | dict(category=Value('string'), image=Picture(), image_source=Value('string')))
    ).to_parquet(folder / 'one.parquet')
    many = plain | dict(images=[shown[n : n + 1 + n % 3] if n % 3 else shown[n : n + 2] for n in range(rows)])
    many['question'] = [
        f'{"<image> or " * len(some)}{word}' if n % 2 else word
        for n, (some, word) in enumerate(zip(many['images'], words))
    ]
    Dataset.from_dict(many, Features(text | dict(images=List(Picture())))).to_parquet(folder / 'many.parquet')
    for n in range(2):
        write_film(folder / f'{n}.mp4', 12 - 7 * n)
    films = plain | dict(film=[str(folder / f'{n % 2}.mp4') for n in range(rows)])
    Dataset.from_dict(films, Features(text | dict(film=Value('string')))).to_parquet(folder / 'film.parquet')
    Dataset.from_dict(plain, Features(text)).to_json(folder / 'text.jsonl')
    for name, data, visual, kind in (
        ('one', 'one.parquet', '!function tools.one', 'parquet'),
        ('many', 'many.parquet', '!function tools.several', 'parquet'),
        ('between', 'many.parquet', '!function tools.several\ndoc_to_messages: !function tools.between', 'parquet'),
        ('film', 'film.parquet', '!function tools.film', 'parquet'),
        ('text', 'text.jsonl', '', 'json'),
    ):
        told = dict(name=f'local_{name}', kind=kind, data=folder / data, visual=visual, text='!function tools.ask')
        (folder / f'{name}.yaml').write_text(TASK.format(**told).replace('doc_to_visual: \n', ''))
    picture = dict(kind='parquet', data=folder / 'one.parquet', visual='doc_to_visual: !function tools.one\n')
    (folder / 'choice.yaml').write_text(CHOICE.format(name='local_choice', **picture))
    return folder


def write_text_task(folder, rows=7):
    "Tasks of lm-eval: `local_options` compares, `local_said` generates."
    from datasets import Dataset

    folder.mkdir(parents=True)
    asked = ['Is this ' + 'very ' * (n % 4) + 'large?' for n in range(rows)]
    Dataset.from_dict(dict(question=asked, answer=['yes', 'no'] * 3 + ['yes'])).to_json(folder / 'options.jsonl')
    plain = dict(name='local_options', kind='json', data=folder / 'options.jsonl', visual='')
    (folder / 'options.yaml').write_text(CHOICE.format(**plain))
    (folder / 'tools.py').write_text(FUNCTIONS)
    told = plain | dict(name='local_said', visual='', text='question')
    (folder / 'said.yaml').write_text(TASK.format(**told).replace('doc_to_visual: \n', ''))
    return folder


def save_tiny(paper, folder):
    "A small model of a paper and its processor, of random weights that answer differently to different questions."
    from test_processing import KINDS, chat_tokenizer
    from toys import model_of

    model = model_of(paper)
    processor = KINDS[paper].from_config(model.config, chat_tokenizer())
    if paper == 'owl3':
        model.config.placeholder_ids = processor.placeholder_ids
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
