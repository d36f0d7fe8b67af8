"""Benchmarks in the very layout in which they are shipped, with a few questions of our own and tiny drawn pictures."""

import base64
import json
from pathlib import Path

from PIL import Image

from mllm_replica.data.images import encode_png
from mllm_replica.scoring.official_scorers import MME_TASKS

SIDE = 6
FLAT_TASKS = ('color', 'count', 'code_reasoning', 'commonsense_reasoning')  # of MME: pictures and texts side by side


def picture(number: int) -> bytes:
    "A tiny picture, a different one for each number."
    image = Image.new('RGB', (SIDE, SIDE), (37 * number % 256, 91 * number % 256, 59 * number % 256))
    image.putpixel((number % SIDE, number // SIDE % SIDE), (255, 255, 255))
    return encode_png(image)


def draw(folder: Path, *names: str) -> None:
    "Pictures under these names, which decide nothing about what is in them."
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def write(path: Path, said) -> None:
    "A JSON file."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=1))


def write_lines(path: Path, rows: list) -> None:
    "A file with a JSON object a line."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def write_tsv(path: Path, heading: list, rows: list[dict]) -> None:
    "A table as pandas writes it: cells with tabs, quotes or line breaks are quoted."

    def cell(value: object) -> str:
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '\t"\n') else text

    lines = ['\t'.join(cell(row.get(name, '')) for name in heading) for row in ({n: n for n in heading}, *rows)]
    path.write_text('\n'.join(lines) + '\n')


def mme(folder: Path) -> None:
    "28 questions: a picture of each of the fourteen subtasks, in both layouts."
    home = folder / 'MME_Benchmark_release_version'
    for task in (task for tasks in MME_TASKS.values() for task in tasks):
        flat = task in FLAT_TASKS
        said, seen = (home / task,) * 2 if flat else (home / task / 'questions_answers_YN', home / task / 'images')
        said.mkdir(parents=True)
        draw(seen, '0001.png' if flat else '0001.jpg')
        (said / '0001.txt').write_text(f'Is it {task}? Please answer yes or no.\tYes\nIs it not?\tNo\n')


COLUMNS = 'index question hint A B C D answer category image source l2-category comment split'.split()


def mmbench_rows(split: str = 'dev') -> list[dict]:
    "Questions 0 to 3 with 2, 3, 4 and 2 options; the last shows the picture of the first, whose hint has two lines."
    options = [['red', 'blue'], ['one', 'two', 'three'], ['north', 'east', 'south', 'west'], ['cat', 'dog']]
    rows = []
    for index, texts in enumerate(options):
        row = dict(index=index, question=f'Which of "{len(texts)}"?', image=base64.b64encode(picture(index)).decode())
        row |= dict(zip('ABCD', texts), answer='ABCD'[(index + 1) % len(texts)], split=split)
        row |= {'category': ['color', 'count'][index % 2], 'l2-category': ['attribute', 'number'][index % 2]}
        rows.append(row)
    rows[0]['hint'] = 'Look at\nthe "picture".'
    rows[3]['image'] = '0'
    if split == 'test':
        for row in rows:
            del row['answer']
    return rows


def turned(rows: list[dict]) -> list[dict]:
    "All rotations of the rows, those of a question behind each other; a later one shows the picture of the first."
    turns = []
    for row in rows:
        texts = [row[letter] for letter in 'ABCD' if row.get(letter)]
        for turn in range(len(texts)):
            there = row | dict(zip('ABCD', texts[turn:] + texts[:turn]), index=row['index'] + turn * 10**6)
            if 'answer' in row:
                there['answer'] = 'ABCD'[('ABCD'.index(row['answer']) - turn) % len(texts)]
            if turn:
                there['image'] = str(row['index']) if len(row['image']) > 64 else row['image']
            turns.append(there)
    return turns


def mmbench(folder: Path) -> None:
    "Eleven rotations of four questions as rows of their own, and a test split without answers and rotations."
    write_tsv(folder / 'mmbench_dev_en_20231003.tsv', COLUMNS, turned(mmbench_rows()))
    write_tsv(folder / 'mmbench_test_en_20231003.tsv', [n for n in COLUMNS if n != 'answer'], mmbench_rows('test'))


def mmbench_cn(folder: Path) -> None:
    "Four questions without rotations."
    write_tsv(folder / 'mmbench_dev_cn_20231003.tsv', COLUMNS, mmbench_rows())
    write_tsv(folder / 'mmbench_test_cn_20231003.tsv', [n for n in COLUMNS if n != 'answer'], mmbench_rows('test'))


SEED_TYPES = {'Scene Understanding': 1, 'Instance Counting': 5, 'Action Recognition': 10}


def seed(folder: Path) -> None:
    "Eight questions on images and four on a frame of a video."
    records = []
    for number in range(12):
        kind = [1, 5, 10][number // 4]
        record = dict(question_id=str(100 + number), question_type_id=kind, question=f'Which, {number}?')
        record |= {f'choice_{letter}': f'{letter} of {number}' for letter in 'abc'} | dict(choice_d=number)
        media = 'video' if kind == 10 else 'image'
        name = f'{number}.webm' if media == 'video' else f'{number}_{number}'
        records.append(record | dict(answer='ABCD'[number % 4], data_type=media, data_id=name))
        shown = f'SEED-Bench-image/{name}' if media == 'image' else f'SEED-Bench-video-image/10_{100 + number}.png'
        draw(folder, shown)
    write(folder / 'SEED-Bench.json', dict(questions=records, question_type=SEED_TYPES))


def pope(folder: Path) -> None:
    "Twelve questions: two pictures with a yes and a no in each of three files."
    names = [f'COCO_val2014_{number:012d}.jpg' for number in (42, 73)]
    draw(folder / 'val2014', *names)
    for kind in ('random', 'popular', 'adversarial'):
        rows = [
            dict(question_id=number + 1, image=names[number // 2], text=f'Is there a {thing}?', label=label)
            for number, (thing, label) in enumerate([('dog', 'yes'), (f'{kind} cat', 'no')] * 2)
        ]
        write_lines(folder / f'coco_pope_{kind}.json', rows)


def _people(number: int) -> list[dict]:
    "What ten people answered: eight one word, two another."
    words = [f'word {number}'] * 8 + ['other', '']
    return [dict(answer=word, answer_confidence='yes', answer_id=i) for i, word in enumerate(words, 1)]


def _pairs(folder: Path, first: str, second: str, split: str) -> None:
    "Eight questions on four pictures of COCO, in VQA's two files."
    questions = [dict(question_id=10 * n, image_id=n // 2 + 1, question=f'What, {n}?') for n in range(8)]
    write(folder / first, dict(info={}, task_type='Open-Ended', data_subtype=split, license={}, questions=questions))
    draw(folder, *(f'{split}/COCO_{split}_{number:012d}.jpg' for number in range(1, 5)))
    if second:
        told = [dict(q, answers=_people(n), multiple_choice_answer='x') for n, q in enumerate(questions)]
        write(folder / second, dict(annotations=[{k: v for k, v in one.items() if k != 'question'} for one in told]))


def vqav2(folder: Path) -> None:
    "The public split and one whose answers are not."
    _pairs(folder, 'v2_OpenEnded_mscoco_val2014_questions.json', 'v2_mscoco_val2014_annotations.json', 'val2014')
    _pairs(folder, 'v2_OpenEnded_mscoco_test-dev2015_questions.json', '', 'test2015')


def okvqa(folder: Path) -> None:
    "OK-VQA's names, which are those of the first VQA."
    _pairs(folder, 'OpenEnded_mscoco_val2014_questions.json', 'mscoco_val2014_annotations.json', 'val2014')


def textvqa(folder: Path) -> None:
    "Eight questions on four pictures, with the words that were read in them."
    images = [f'{number:016x}' for number in range(4)]
    draw(folder, *(f'train_images/{image}.jpg' for image in images))
    records = [
        dict(
            question_id=34602 + n,
            image_id=images[n // 2],
            question=f'what is written, {n}?',
            answers=[person['answer'] for person in _people(n)],
            set_name='val',
        )
        for n in range(8)
    ]
    write(folder / 'TextVQA_0.5.1_val.json', dict(dataset_type='val', dataset_name='textvqa', data=records))
    words = [dict(image_id=image, ocr_tokens=['STOP', '', 'now'] * (n > 0)) for n, image in enumerate(images)]
    write(folder / 'TextVQA_Rosetta_OCR_v0.2_val.json', dict(dataset_type='val', data=words))


def vizwiz(folder: Path) -> None:
    "Eight questions in each split, the answers of one of them public."
    for split in ('val', 'test'):
        names = [f'VizWiz_{split}_{number:08d}.jpg' for number in range(8)]
        draw(folder / split, *names)
        records = [dict(image=name, question=f'What is this, {n}?') for n, name in enumerate(names)]
        told = [record | dict(answers=_people(n), answerable=1) for n, record in enumerate(records)]
        write(folder / 'Annotations' / f'{split}.json', told if split == 'val' else records)


def gqa(folder: Path) -> None:
    "Eight questions on four pictures, by their ids."
    draw(folder / 'images', *(f'n{number}.jpg' for number in range(4)))
    said = {
        f'2020{n}': dict(question=f'Is it {n}?', imageId=f'n{n // 2}', answer=['yes', 'left'][n % 2], isBalanced=True)
        for n in range(8)
    }
    write(folder / 'testdev_balanced_questions.json', said)


def scienceqa(folder: Path) -> None:
    "Twelve problems of the test split and one of another: all subjects, grades, with and without image and hint."
    problems = {}
    for n in range(13):
        split = 'train' if n == 12 else 'test'
        problems[str(n)] = dict(
            question=f'Which is right, {n}?',
            choices=['iron', 'wood', 'glass', 'wool'][: 2 + n % 3],
            answer=n % 2,
            hint='Think of it.' if n % 3 else '',
            image='image.png' if n % 2 else None,
            grade=f'grade{n % 12 + 1}',
            subject=['natural science', 'social science', 'language science'][n % 3],
            split=split,
            task='closed choice',
        )
        if n % 2:
            draw(folder, f'images/{split}/{n}/image.png')
    write(folder / 'problems.json', problems)
    write(folder / 'pid_splits.json', dict(train=['12'], val=[], test=[str(n) for n in range(12)]))


SAID = ['a red dog runs over the grass', 'two cats asleep on a chair', 'one old man reads a book', 'blue cars in a row']


def coco(folder: Path) -> None:
    "Four pictures in the list that is shared in place of Karpathy's file."
    names = [f'val2014/COCO_val2014_{number:012d}.jpg' for number in range(1, 9)]
    draw(folder, *names)
    texts = [SAID[n % 4] + ' again' * (n > 3) for n in range(8)]
    write(folder / 'coco_karpathy_test.json', [dict(image=n, caption=[t, t + ' .']) for n, t in zip(names, texts)])


def flickr30k(folder: Path) -> None:
    "Eight pictures of the test split and one of another, in Karpathy's file."
    names = [f'{1000 + number}.jpg' for number in range(9)]
    draw(folder / 'flickr30k-images', *names)
    images = [
        dict(
            filename=name,
            imgid=n,
            split='train' if n == 8 else 'test',
            sentences=[dict(raw=f'{SAID[n % 4]} {n}', sentid=5 * n, tokens=[])] * 2,
        )
        for n, name in enumerate(names)
    ]
    write(folder / 'dataset_flickr30k.json', dict(images=images, dataset='flickr30k'))


def nocaps(folder: Path) -> None:
    "Eight pictures and sixteen captions, in COCO's form."
    names = [f'{number:016x}.jpg' for number in range(8)]
    draw(folder / 'images', *names)
    images = [dict(id=n, file_name=name, domain='in-domain', open_images_id=name[:-4]) for n, name in enumerate(names)]
    captions = [dict(id=n, image_id=n % 8, caption=f'{SAID[n % 4]} {n % 8}') for n in range(16)]
    write(folder / 'nocaps_val_4500_captions.json', dict(images=images, annotations=captions))


def textcaps(folder: Path) -> None:
    "Eight pictures and sixteen captions, a record each."
    names = [f'{number:016x}' for number in range(8)]
    draw(folder / 'train_images', *(f'{name}.jpg' for name in names))
    records = [
        dict(caption_id=n, image_id=names[n % 8], image_path=f'train/{n}.jpg', caption_str=f'{SAID[n % 4]} {n % 8}')
        for n in range(16)
    ]
    write(folder / 'TextCaps_0.1_val.json', dict(dataset_type='val', data=records))


def mibench(folder: Path) -> None:
    "Four questions in each of two lists, on two pictures each."
    for part, task in (
        ('multi_image_instruction', 'general_comparison'),
        ('multimodal_knowledge_seeking', 'text_rich_images'),
    ):
        records = []
        for n in range(4):
            paths = [f'image/{task}/{n}-img{i}.png' for i in range(2)]
            draw(folder, *paths)
            options = ['left.', 'right.', 'both.'][: 2 + n % 2]
            record = dict(id=f'{task}_{n}', image=paths, question=f'Between <image> and <image>, which? {n}')
            records.append(record | dict(options=options, answer=options[n % 2], task=task, type=part))
        write(folder / f'{part}.json', records)


SHIPPED = {
    made.__name__: made
    for made in (
        mme,
        mmbench,
        mmbench_cn,
        seed,
        pope,
        vqav2,
        okvqa,
        textvqa,
        vizwiz,
        gqa,
        scienceqa,
        coco,
        flickr30k,
        nocaps,
        textcaps,
        mibench,
    )
}
PUBLIC = dict(  # the split that is made, with public answers
    mme='test',
    mmbench='dev',
    mmbench_cn='dev',
    seed='test',
    pope='test',
    vqav2='val',
    okvqa='val',
    textvqa='val',
    vizwiz='val',
    gqa='testdev',
    scienceqa='test',
    coco='test',
    flickr30k='test',
    nocaps='val',
    textcaps='val',
    mibench='test',
)
HIDDEN = dict(mmbench='test', mmbench_cn='test', vqav2='test_dev', vizwiz='test')  # splits without


def made(name: str, folder: Path) -> Path:
    "The folder with a benchmark in it."
    folder.mkdir(parents=True, exist_ok=True)
    SHIPPED[name](folder)
    return folder
