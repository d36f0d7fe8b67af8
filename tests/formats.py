"""Public data formats in their true layouts, made small: entries, the files that hold them, and the samples they are."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

JPG = {}  # colour → a picture's bytes
for colour in ('red', 'green', 'blue'):
    buffer = io.BytesIO()
    Image.new('RGB', (12, 8), colour).save(buffer, 'JPEG')
    JPG[colour] = buffer.getvalue()


def turns(*said, roles=('human', 'gpt')):
    return [{'from': roles[i % 2], 'value': text} for i, text in enumerate(said)]


def put(folder, path, content):
    place = folder / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


# --- entries as they lie, and (images, conversation or document) of their samples ----------------------------------------
LLAVA_558K = [
    {
        'id': '004539375',
        'image': '00453/004539375.jpg',
        'conversations': turns('Render a summary of the photo.\n<image>', 'a red area'),
    },
    {'id': '002239345', 'image': '00223/002239345.jpg', 'conversations': turns('<image>\nWhat is this?', 'green')},
]
LLAVA_665K = [
    {
        'id': '000000033471',
        'image': 'coco/train2017/000000033471.jpg',
        'conversations': turns('<image>\nWhat is it?', 'a bus', 'And its colour?', 'red'),
    },
    {  # the id comes again; two marks for one picture
        'id': '000000033471',
        'image': 'coco/train2017/000000033471.jpg',
        'conversations': turns('<image>\nis this <image> red?', 'yes'),
    },
    {'id': 'wgByO4Y_0', 'model': '', 'conversations': turns('Say hi.', 'hi')},
]
SHAREGPT = [
    {'id': 'QWJhYvA_0', 'conversations': turns('Hello.', 'Hi!')},
    {
        'id': 'QWJhYvA_17',
        'conversations': turns('and so on', 'Why?', 'Because.', 'Go on', roles=('gpt', 'human')),
    },
    {
        'id': 'i6IyJda_0',
        'conversations': [{'from': 'system', 'value': 'Be kind.'}, *turns('Two?', '2', 'Three?', '3', 'Four?')],
    },
]
M4 = [
    {
        'sample_id': 'nlvr2_0',
        'image': ['nlvr2/a.jpg', 'nlvr2/b.jpg'],
        'conversations': turns('Left: <image>. Right: <image>. Same?', 'no'),
        'metadata': {'dataset': 'NLVR2'},
    },
    {
        'sample_id': 'coinstruct_1',
        'image': ['nlvr2/a.jpg'],
        'conversations': turns('<image>\nIs it sharp?', 'yes', 'Sure?', 'quite'),
    },
]
FETCHED = [  # (key, caption, picture or None, further fields)
    ('000000000', 'a red area', JPG['red'], {}),
    ('000000001', 'gone', None, {'error_message': 'HTTP Error 404: Not Found'}),
    ('000000002', 'a blue area', JPG['blue'], {}),
]
OBELICS = [
    {
        'images': ['http://a.b/red.jpg', None, 'http://a.b/blue.png?w=8'],
        'texts': [None, 'A red one.\n\nEND_OF_DOCUMENT_TOKEN_TO_BE_REPLACED\n\nAnd a blue one:', None],
        'metadata': json.dumps([{'src': 'http://a.b/red.jpg'}, None, {'src': 'http://a.b/blue.png?w=8'}]),
        'general_metadata': json.dumps({'url': 'http://a.b'}),
    },
    {
        'images': [None, 'http://a.b/red.jpg'],
        'texts': ['Red again.', None],
        'metadata': '[null, {}]',
        'general_metadata': '{}',
    },
]
MMC4 = [
    {
        'image_info': [
            {
                'face_detections': None,
                'image_name': 'b9040a0dbb22.jpg',
                'matched_sim': 0.28,
                'matched_text_index': 2,
                'raw_url': 'http://a.b/1.jpg',
            },
            {
                'face_detections': None,
                'image_name': 'db1c21bc8474.jpg',
                'matched_sim': 0.32,
                'matched_text_index': 0,
                'raw_url': 'http://a.b/2.jpg',
            },
        ],
        'similarity_matrix': [[0.24, 0.31, 0.28], [0.32, 0.22, 0.26]],
        'text_list': ['Lock the door.', 'All of them.', 'And the tailgate.'],
        'url': 'http://a.b/hofi-48.html',
        'could_have_url_duplicate': 0,
    }
]
VIDEO = [
    {
        'id': 'v_1',
        'video': 'academic_source/v_1.mp4',
        'data_source': '0_30_s_academic_v0_1',
        'conversations': turns('<image>\nWhat happens?', 'It turns blue.'),
    },
    {'video': 'academic_source/v_1.mp4', 'QA': [{'i': 'Look.', 'q': 'Which colour?', 'a': 'red'}]},
]


def _pictures(folder):
    for path, colour in {
        'LLaVA-Pretrain/images/00453/004539375.jpg': 'red',
        'LLaVA-Pretrain/images/00223/002239345.jpg': 'green',
        'playground/data/coco/train2017/000000033471.jpg': 'red',
        'm4/nlvr2/a.jpg': 'red',
        'm4/nlvr2/b.jpg': 'blue',
        'mmc4/images/b9040a0dbb22.jpg': 'blue',
        'mmc4/images/db1c21bc8474.jpg': 'red',
        'obelics/images/00000/000000000.jpg': 'red',
        'obelics/images/00000/000000002.jpg': 'blue',
        'video/academic_source/v_1/c01_0001.jpeg': 'red',
        'video/academic_source/v_1/c01_0002.jpeg': 'green',
        'video/academic_source/v_1/c01_0003.jpeg': 'blue',
    }.items():
        put(folder, path, JPG[colour])


def _as_json(path, entries):
    put(path.parent, path.name, json.dumps(entries, indent=1).encode())


def _as_lines(path, entries):
    put(path.parent, path.name, b'\n'.join(json.dumps(entry).encode() for entry in entries))


def as_rows(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(entries), path)


def _about(key, text, image, more):
    status = 'success' if image else 'failed_to_download'
    about = dict(caption=text, url=f'http://a.b/{key}.jpg', key=key, status=status, error_message=None)
    return about | dict(width=12 if image else None, height=8 if image else None, exif='{}' if image else None) | more


def shard_of(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def _as_shard(path, entries):
    "What img2dataset writes as webdataset: the shard without what failed, its list and its numbers."
    members = [
        (f'{key}.{ending}', content)
        for key, text, image, more in entries
        if image is not None
        for ending, content in (
            ('jpg', image),
            ('txt', text.encode()),
            ('json', json.dumps(_about(key, text, image, more), indent=4).encode()),
        )
    ]
    shard_of(path, members)
    as_rows(path.with_suffix('.parquet'), [_about(*entry) for entry in entries])
    put(path.parent, f'{path.stem}_stats.json', b'{"count": 3}')


def _as_fetched_rows(path, entries):
    "What img2dataset writes as parquet: the bytes in the list."
    as_rows(path, [_about(*entry) | {'jpg': entry[2], 'txt': entry[1] if entry[2] else None} for entry in entries])


def _with_list(path, entries):
    "OBELICS, and what img2dataset wrote of its pictures as files."
    as_rows(path, entries)
    rows = [('http://a.b/red.jpg', '000000000', 'success'), ('http://a.b/x.jpg', '000000001', 'failed_to_download')]
    rows += [('http://a.b/blue.png?w=8', '000000002', 'success')]
    as_rows(path.parents[1] / 'images' / '00000.parquet', [dict(url=u, key=k, status=s) for u, k, s in rows])


LAYOUTS = {  # name → format, kind, file, folder of pictures, entries, how they are written
    '558k': ('llava', 'folder', 'LLaVA-Pretrain/blip_laion_cc_sbu_558k.json', 'images', LLAVA_558K, _as_json),
    '665k': ('llava', 'folder', 'playground/data/llava_v1_5_mix665k.json', '.', LLAVA_665K, _as_json),
    'sharegpt': ('sharegpt', 'folder', 'ShareGPT_V3_unfiltered_cleaned_split.json', '.', SHAREGPT, _as_json),
    'm4': ('m4', 'folder', 'm4/m4_instruct_annotations.json', '.', M4, _as_json),
    'shards': ('captions', 'tar', 'cc3m/00000.tar', '.', FETCHED, _as_shard),
    'rows': ('captions', 'parquet', 'coyo/00000.parquet', '.', FETCHED, _as_fetched_rows),
    'obelics': ('obelics', 'parquet', 'obelics/data/train-00000-of-00001.parquet', '../images', OBELICS, _with_list),
    'mmc4': ('mmc4', 'folder', 'mmc4/docs_no_face_shard_0_v2.jsonl', 'images', MMC4, _as_lines),
    'video': ('llava_video', 'folder', 'video/0_30_s_academic_oe_v0_1_qa_processed.json', '.', VIDEO, _as_json),
}
SAMPLES = {  # colours, and what is said with them
    '558k': [
        (['red'], turns('Render a summary of the photo.\n<image>', 'a red area')),
        (['green'], turns('<image>\nWhat is this?', 'green')),
    ],
    '665k': [
        (['red'], turns('<image>\nWhat is it?', 'a bus', 'And its colour?', 'red')),
        (['red'], turns('<image>\nis this  red?', 'yes')),
        ([], turns('Say hi.', 'hi')),
    ],
    'sharegpt': [
        ([], turns('Hello.', 'Hi!')),
        ([], turns('Why?', 'Because.')),
        ([], turns('Two?', '2', 'Three?', '3')),
    ],
    'm4': [
        (['red', 'blue'], turns('Left: <image>. Right: <image>. Same?', 'no')),
        (['red'], turns('<image>\nIs it sharp?', 'yes', 'Sure?', 'quite')),
    ],
    'shards': [(['red'], turns('<image>', 'a red area')), (['blue'], turns('<image>', 'a blue area'))],
    'rows': [(['red'], turns('<image>', 'a red area')), (['blue'], turns('<image>', 'a blue area'))],
    'obelics': [
        (['red', 'blue'], '<image> A red one.\n\n\n\nAnd a blue one: <image>'),
        (['red'], 'Red again. <image>'),
    ],
    'mmc4': [(['red', 'blue'], '<image> Lock the door. All of them. <image> And the tailgate.')],
    'video': [
        (['red', 'blue'], turns('<image><image>\nWhat happens?', 'It turns blue.')),
        (['red', 'blue'], turns('<image><image>\nLook. Which colour?', 'red')),
    ],
}


def write(name: str, root: Path, entries: list | None = None) -> Path:
    "A format's files below a folder; its data file."
    _, _, file, _, own, save = LAYOUTS[name]
    _pictures(root)
    save(root / file, own if entries is None else entries)
    return root / file
