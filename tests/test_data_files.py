"""Hostile data: each file is read whole with a count of what is not kept, or it is refused.

A refusal states the rule, the place and the remedy. What a file holds is known because a library
wrote it: csv, json, pandas, pyarrow, datasets."""

import bz2, csv, gzip, json, lzma, os, random

import datasets, pandas as pd, pyarrow as pa, pyarrow.feather, pyarrow.parquet as pq, pytest
import zstandard
from PIL import Image

from enigma_lab.data import text as texts_of
from enigma_lab.data.images import load_images
from enigma_lab.data.instruct import load_chats, question
from enigma_lab.data.leaks import remove_leaks
from enigma_lab.data.pairs import load_pairs
from enigma_lab.data.tables import part_of, read_rows
from enigma_lab.data.text import load_text

datasets.disable_progress_bars()
TEXTS = [
    f'Document {i}, "the {i}th": it was dark;\n\nthe rain\tfell — {"so " * (i % 7)}on.'
    for i in range(240)
]
PLAIN = [
    f'Document {i} says that the night was dark and that rain fell {i} times' for i in range(240)
]
CHINESE = ''.join(f'第{i}章：這是一個用於測試的故事，天黑了，下著雨。\n\n' for i in range(60))
SIMPLE = CHINESE.translate(str.maketrans('這個於測試黑著', '这个于测试黑着'))
ROWS = [dict(id=i, text=text) for i, text in enumerate(TEXTS)]
FRAME = pd.DataFrame(ROWS)


def jsonl(rows, **how):
    return ''.join(json.dumps(row, **how) + '\n' for row in rows)


def write(path, content, code='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(code))
    return path


def file(name, content, code='utf-8', texts=TEXTS):
    return lambda folder: (write(folder / name, content, code), texts)


def frame(name, method, texts=TEXTS, data=FRAME, **how):
    def make(folder):
        getattr(data, method)(folder / name, **how)
        return folder / name, texts

    return make


def parquet(columns, texts=TEXTS, **how):
    def make(folder):
        pq.write_table(pa.table(columns), folder / 'a.parquet', **how)
        return folder / 'a.parquet', texts

    return make


def several(files, texts=TEXTS):
    def make(folder):
        for name, content in files.items():
            write(folder / 'data' / name, content)
        return folder / 'data', texts

    return make


def link(folder):
    write(folder / 'else' / 'a.jsonl', jsonl(ROWS[:100]))
    write(folder / 'blobs' / '0af3', jsonl(ROWS[100:]))
    (folder / 'data' / 'deep').mkdir(parents=True)
    os.symlink(folder / 'else', folder / 'data' / 'more')
    os.symlink(folder / 'data', folder / 'data' / 'deep' / 'loop')
    os.symlink(folder / 'blobs' / '0af3', folder / 'data' / 'b.jsonl')
    os.symlink(folder / 'nowhere', folder / 'data' / 'broken.txt')
    return folder / 'data', TEXTS


def given(data, texts=TEXTS):
    return lambda folder: (data(), texts)


def saved(data):
    def make(folder):
        data().save_to_disk(folder / 'saved')
        return folder / 'saved', TEXTS

    return make


def csv_text(rows, names=('id', 'text'), **how):
    from io import StringIO

    out = StringIO()
    writer = csv.writer(out, **how)
    writer.writerows([names, *rows])
    return out.getvalue()


table = csv_text([row.values() for row in ROWS])
dataset = lambda: datasets.Dataset.from_list(ROWS)
chats = [
    dict(instruction=f'Question {i}?', input='' if i % 2 else 'x', output=f'Answer {i}.')
    for i in range(240)
]
said = ['\n'.join(filter(None, row.values())) for row in chats]
talks = [
    dict(conversations=[{'from': 'human', 'value': f'q{i}'}, {'from': 'gpt', 'value': f'a{i}'}])
    for i in range(240)
]
odd = [f'line{c}separator{c}{i}' for i in range(40) for c in ('\u2028', '\x85', '\x1c', '\f', '\v')]
parts = [PLAIN[:200], PLAIN[200:220], PLAIN[220:]]
nulls = [dict(id=f'id {i}', text=text) for i, text in enumerate([None, None, *PLAIN])]
once = lambda texts: 'text\n' + ''.join(f'"{text}"\n' for text in texts)

WHOLE = {  # what: (folder -> (path or data, its texts), {reason: rows dropped}, arguments)
    # cells
    'csv': (file('a.csv', table), {}),
    'csv of pandas, with its index': (frame('a.csv', 'to_csv'), {}),
    'csv with a mark': (file('a.csv', table, 'utf-8-sig'), {}),
    'csv in UTF-16': (file('a.csv', table, 'utf-16'), {}),
    'csv with semicolons': (frame('a.csv', 'to_csv', sep=';', index=False), {}),
    'csv with tabs': (frame('a.csv', 'to_csv', sep='\t', index=False), {}),
    'csv with line ends of a Mac': (
        file('a.csv', once(PLAIN).replace('\n', '\r'), texts=PLAIN),
        {},
    ),
    'csv with a cell of 300 KB': (
        file(
            'a.csv',
            once(['word ' * 60_000 + 'end', *PLAIN]),
            texts=['word ' * 60_000 + 'end', *PLAIN],
        ),
        {},
    ),
    'csv with empty lines': (file('a.csv', once(PLAIN).replace('\n', '\n\n'), texts=PLAIN), {}),
    'csv with empty cells': (
        file('a.csv', csv_text([[7, ' '], *enumerate(PLAIN)]), texts=PLAIN),
        dict(empty=1),
    ),
    'csv with ids and one column of texts': (
        file('a.csv', csv_text(enumerate(PLAIN), ('id', 'body')), texts=PLAIN),
        {},
    ),
    'csv with numbers as texts': (
        file(
            'a.csv',
            csv_text([[i, i * 7] for i in range(240)]),
            texts=[str(i * 7) for i in range(240)],
        ),
        {},
    ),
    'csv with two ragged rows in a hundred each': (
        file('a.csv', once(PLAIN) + 'a, b\nc, d\n', texts=PLAIN),
        {'too many cells': 2},
    ),
    'csv without quotes, when told so': (
        file('a.csv', 'text\na, b\n' + '\n'.join(PLAIN), texts=PLAIN),
        {'too many cells': 1},
        dict(max_dropped=0.5),
    ),
    'tsv with quotes': (frame('a.tsv', 'to_csv', sep='\t', index=False), {}),
    'tsv with stray quotes': (
        file(
            'a.tsv',
            'id\ttext\n' + ''.join(f'{i}\t"{t}\n' for i, t in enumerate(PLAIN)),
            texts=['"' + t for t in PLAIN],
        ),
        {},
    ),
    'tsv without names': (file('a.tsv', '\n'.join(PLAIN), texts=PLAIN), {}),
    # JSON
    'json': (frame('a.json', 'to_json', orient='records'), {}),
    'json of strings': (file('a.json', json.dumps(TEXTS)), {}),
    'json with rows in an object': (file('a.json', json.dumps(dict(version='1', data=ROWS))), {}),
    'json that is json lines': (frame('a.json', 'to_json', orient='records', lines=True), {}),
    'jsonl that is a list': (file('a.jsonl', json.dumps(ROWS, indent=1)), {}),
    'jsonl in UTF-16, big end first': (file('a.jsonl', '\ufeff' + jsonl(ROWS), 'utf-16-be'), {}),
    'jsonl over several lines': (file('a.jsonl', jsonl(ROWS, indent=2)), {}),
    'jsonl with odd separators': (
        file('a.jsonl', jsonl([dict(text=t) for t in odd], ensure_ascii=False), texts=odd),
        {},
    ),
    'jsonl with empty lines': (
        file('a.jsonl', '\n \n' + jsonl(ROWS).replace('\n', '\r\n\r\n')),
        {},
    ),
    'jsonl with escapes': (
        file(
            'a.jsonl', jsonl([dict(text=t + ' 🌧') for t in PLAIN]), texts=[t + ' 🌧' for t in PLAIN]
        ),
        {},
    ),
    'jsonl with other columns': (
        file('a.jsonl', jsonl([dict(row, meta=dict(tags=['a'])) for row in ROWS])),
        {},
    ),
    'jsonl with null first': (
        file('a.jsonl', jsonl(nulls), texts=PLAIN),
        dict(empty=2),
    ),
    'jsonl with titles': (
        file(
            'a.jsonl',
            jsonl([dict(title=f't{i}', text=t) for i, t in enumerate(['', *PLAIN])]),
            texts=PLAIN,
        ),
        dict(empty=1),
    ),
    'jsonl with NaN': (file('a.jsonl', jsonl([dict(text=float('nan')), *ROWS])), dict(empty=1)),
    'jsonl with one broken line': (
        file('a.jsonl', jsonl(ROWS) + '{"text": "cut o'),
        {'no JSON': 1},
    ),
    'jsonl with copies': (file('a.jsonl', jsonl(ROWS * 2)), dict(duplicate=240)),
    'ndjson': (file('a.ndjson', jsonl(ROWS)), {}),
    'instruction rows': (file('sft.jsonl', jsonl(chats), texts=said), {}),
    'conversations': (
        file('sft.json', json.dumps(talks), texts=[f'q{i}\na{i}' for i in range(240)]),
        {},
    ),
    # parquet
    'parquet': (frame('a.parquet', 'to_parquet'), {}),
    'parquet of large strings': (parquet(dict(text=pa.array(TEXTS, pa.large_string()))), {}),
    'parquet with a dictionary': (
        parquet(dict(text=pa.array(TEXTS * 2).dictionary_encode())),
        dict(duplicate=240),
    ),
    'parquet with lists beside': (
        parquet(dict(ids=[[i] for i in range(240)], body=TEXTS), row_group_size=7),
        {},
    ),
    'parquet with null first': (
        parquet(dict(key=[None, *map(str, range(240))], body=[None, *TEXTS])),
        dict(empty=1),
    ),
    # compression
    'gz': (file('a.jsonl.gz', gzip.compress(jsonl(ROWS).encode())), {}),
    'gz that does not say so': (file('a.jsonl', gzip.compress(jsonl(ROWS).encode())), {}),
    'no gz that says so': (file('a.jsonl.gz', jsonl(ROWS)), {}),
    'gz in two members': (
        file(
            'a.jsonl.gz', b''.join(gzip.compress(jsonl(r).encode()) for r in (ROWS[:99], ROWS[99:]))
        ),
        {},
    ),
    'bz2 in two streams': (
        file(
            'a.jsonl.bz2', b''.join(bz2.compress(jsonl(r).encode()) for r in (ROWS[:99], ROWS[99:]))
        ),
        {},
    ),
    'xz': (file('a.csv.xz', lzma.compress(table.encode())), {}),
    'zst in two frames': (
        file(
            'a.jsonl.zst',
            b''.join(zstandard.compress(jsonl(r).encode()) for r in (ROWS[:99], ROWS[99:])),
        ),
        {},
    ),
    # texts
    'txt with a mark': (file('a.txt', CHINESE, 'utf-8-sig', CHINESE), {}),
    'txt in UTF-16': (file('a.txt', CHINESE, 'utf-16', CHINESE), {}),
    'txt in UTF-32': (file('a.txt', CHINESE, 'utf-32', CHINESE), {}),
    'txt in GB18030': (file('a.txt', SIMPLE, 'gb18030', SIMPLE), {}),
    'txt in Big5': (file('a.txt', CHINESE.replace('—', ''), 'big5', CHINESE), {}),
    'txt in Latin-1, when told so': (
        file('a.txt', 'schöne Grüße\n\n' * 60, 'latin-1', 'schöne Grüße\n\n' * 60),
        {},
        dict(encoding='latin-1'),
    ),
    'txt with line ends of a Mac': (file('a.txt', CHINESE.replace('\n', '\r'), texts=CHINESE), {}),
    'txt with odd separators': (file('a.txt', '\n\n'.join(odd), texts='\n\n'.join(odd)), {}),
    'md': (file('a.md', '# Title\n\n' + CHINESE, texts='# Title\n\n' + CHINESE), {}),
    'text without a suffix': (file('wiki_00', CHINESE, texts=CHINESE), {}),
    'json lines without a suffix': (file('wiki_00', jsonl(ROWS)), {}),
    # folders
    'folder of texts': (several({f'{i % 3}/{i}': t for i, t in enumerate(PLAIN)}, PLAIN), {}),
    'folder with hidden files': (
        several(
            {
                'a.jsonl': jsonl(ROWS),
                '.DS_Store': b'\0\1',
                '.git/a.jsonl': b'{',
                'README.md': 'about',
            }
        ),
        {},
    ),
    'folder of formats': (
        several(
            {'a.jsonl': jsonl(ROWS[:80]), 'b/c.csv': csv_text([r.values() for r in ROWS[80:]])}
        ),
        {},
    ),
    'folder of links': (link, {}),
    # saved, and in memory
    'saved dataset': (saved(dataset), {}),
    'dataset': (given(dataset), {}),
    'iterable dataset': (given(lambda: dataset().to_iterable_dataset()), {}),
    'frame': (given(lambda: FRAME), {}),
    'table of pyarrow': (given(lambda: pa.Table.from_pandas(FRAME)), {}),
    'list of texts': (given(lambda: TEXTS), {}),
    'generator': (given(lambda: (dict(row) for row in ROWS)), {}),
}


def everything(corpus):
    return [*corpus.train, *corpus.validation, *corpus._test]


def check_counts(corpus, dropped, kept):
    rows = corpus.rows
    assert rows.read == rows.kept + sum(rows.dropped.values()) and rows.kept == kept
    assert dict(rows.dropped) == dropped
    card = corpus.card()
    assert (card['rows_read'], card['rows_kept']) == (rows.read, kept)
    assert card['rows_dropped'] == dropped


@pytest.mark.parametrize('what', WHOLE)
def test_read_whole(what, tmp_path):
    make, dropped, *more = WHOLE[what]
    data, texts = make(tmp_path)
    corpus = load_text(data, **(more[0] if more else {}))
    if isinstance(texts, str):
        assert ''.join(everything(corpus)) == texts.strip()
        check_counts(corpus, dropped, 1)
    else:
        assert sorted(everything(corpus)) == sorted(text.strip() for text in texts)
        check_counts(corpus, dropped, len(texts))
    assert all(map(len, (corpus.train, corpus.validation, corpus._test)))


def test_the_table_is_large_enough():
    assert len(WHOLE) >= 33 and len(WHOLE) + len(REFUSED) >= 45


@pytest.mark.parametrize(
    'name, read',
    [
        ('csv', pd.read_csv),
        ('csv of pandas, with its index', pd.read_csv),
        ('csv with empty lines', pd.read_csv),
        ('csv with a cell of 300 KB', pd.read_csv),
        ('json that is json lines', lambda path: pd.read_json(path, lines=True)),
        ('parquet of large strings', pd.read_parquet),
        ('xz', pd.read_csv),
        ('gz', lambda path: pd.read_json(path, lines=True)),
        ('jsonl with odd separators', lambda path: pd.read_json(path, lines=True)),
        ('tsv with quotes', lambda path: pd.read_csv(path, sep='\t')),
    ],
)
def test_rows_are_those_of_pandas(name, read, tmp_path):
    path, _ = WHOLE[name][0](tmp_path)
    assert [row['text'] for row in read_rows(path)] == list(read(path)['text'])


ragged = 'text\n' + ''.join(f'It rained{", and rained" * (i % 6 > 0)}\n' for i in range(60))
mixed = [dict(text=t) if i % 2 else dict(content=t) for i, t in enumerate(PLAIN)]
bad = jsonl(ROWS[:20]).splitlines()
bad[6] = '{"text": "a",}'

REFUSED = {  # what: (folder -> (path or data, _), fragments of the message)
    'csv without quotes': (
        file('a.csv', ragged),
        ['50 of 60 (83.3%)', 'a.csv line 3', 'quotes around cells', 'max_dropped='],
    ),
    'csv with an open quote': (
        file('a.csv', once(PLAIN[:5]) + '"open\n' + '\n'.join(PLAIN)),
        ['broken quotes: 241', 'line 7', 'close every quote'],
    ),
    'csv with an open quote that another closes': (
        file('a.csv', once(PLAIN[:5]) + '"open\n' + once(PLAIN)),
        ['broken quotes', 'line 7'],
    ),
    'csv with a column twice': (
        file('a.csv', csv_text([['a', 'b']], ('text', 'text'))),
        ["['text'] twice", 'line 1', 'rename'],
    ),
    'csv without names': (
        file('a.csv', 'Once upon a time.\nThere was\n'),
        ['must name the columns', 'Once', 'add a first line'],
    ),
    'csv with two columns of texts': (
        file('a.csv', csv_text(zip(PLAIN, PLAIN), ('a', 'b'))),
        ["column 'text'", "['a', 'b']", 'column='],
    ),
    'tsv with three columns without names': (
        file('a.tsv', 'x y\tz\tw'),
        ['one or two in each row', 'line 1'],
    ),
    'two columns in turn': (
        file('a.jsonl', jsonl(mixed)),
        ["no column 'text': 120", 'line 1', 'column='],
    ),
    'two columns in turn, in parquet': (
        parquet(
            dict(
                text=[t if i % 2 else None for i, t in enumerate(PLAIN)],
                content=[None if i % 2 else t for i, t in enumerate(PLAIN)],
            )
        ),
        ['text in another column: 120', 'row 1'],
    ),
    'jsonl with a broken line': (
        file('a.jsonl', '\n'.join(bad)),
        ['1 of 20 (5.0%)', 'no JSON', 'a.jsonl line 7', 'one object on each line'],
    ),
    'jsonl that ends within a value': (
        file('a.jsonl', jsonl(ROWS, indent=1)[:-9]),
        ['must hold JSON', 'a.jsonl'],
    ),
    'jsonl with lists': (file('a.jsonl', '["a"]\n["b"]\n'), ['no JSON object: 2', 'line 1']),
    'jsonl with a key twice': (
        file('a.jsonl', '{"text": "a", "text": "b"}\n' * 3),
        ['a key twice: 3', 'line 1'],
    ),
    'jsonl over several lines, with a key twice': (
        file('a.jsonl', jsonl(ROWS[:3], indent=1) + '{\n"text": "a",\n"text": "b"\n}'),
        ['a key twice: 1', 'a.jsonl line 13'],
    ),
    'jsonl with half a surrogate pair': (
        file('a.jsonl', '{"text": "\\ud83d"}\n' * 3),
        ['half of a surrogate pair: 3'],
    ),
    'jsonl with a zero character': (
        file('a.jsonl', '{"text": "a\\u0000"}\n' * 3),
        ['a zero character: 3'],
    ),
    'jsonl with texts of several types': (
        file('a.jsonl', jsonl([dict(text=7), dict(text='a'), dict(text=['b'])])),
        ['2 of 3', 'no string', 'line 1'],
    ),
    'json with trailing commas': (file('a.json', '[{"text": "a"},]'), ['must hold JSON', 'line 1']),
    'json with its parts inside': (
        file('a.json', json.dumps(dict(train=ROWS, test=ROWS))),
        ["['train', 'test']", 'file of its own'],
    ),
    'json by columns': (frame('a.json', 'to_json'), ['one list of rows', "orient='records'"]),
    'json too deep': (file('a.json', '[' * 10**5), ['too deep']),
    'parquet with lists of texts': (parquet(dict(text=[['a'], ['b']])), ['no string: 2', 'list']),
    'parquet with numbers': (parquet(dict(text=[1, 2])), ['no string: 2', 'int']),
    'parquet that is cut': (
        lambda f: (write(f / 'b.parquet', parquet(dict(text=TEXTS))(f)[0].read_bytes()[:-99]), 0),
        ['whole parquet file', 'b.parquet'],
    ),
    'gz that is cut': (
        file('a.txt.gz', gzip.compress(table.encode())[:-20]),
        ['must be whole', 'a.txt.gz', 'again'],
    ),
    'xz that is cut': (
        file('a.txt.xz', lzma.compress(table.encode())[:-20]),
        ['must be whole', 'a.txt.xz'],
    ),
    'bz2 that is cut': (
        file('a.txt.bz2', bz2.compress(table.encode())[:-20]),
        ['must be whole', 'a.txt.bz2'],
    ),
    'zst that is cut': (
        file('a.txt.zst', zstandard.compress(table.encode())[:-20]),
        ['must be whole', 'a.txt.zst'],
    ),
    'empty gz': (file('a.txt.gz', gzip.compress(b'')), ['must hold text']),
    'Latin-1': (
        file('a.txt', 'schöne Grüße ' * 50, 'latin-1'),
        ['must be UTF-8', '0xf6 at 3', 'encoding=', 'cp1252'],
    ),
    'UTF-8 that breaks': (
        file('a.txt', SIMPLE.encode()[:-10] + b'\xff' + SIMPLE.encode()),
        ['must be UTF-8', 'a.txt'],
    ),
    'another encoding than told': (
        file('a.txt', SIMPLE),
        ['must be ascii', '0xe7 at 0'],
        dict(encoding='ascii'),
    ),
    'an encoding that is none': (
        file('a.txt', SIMPLE),
        ["got 'klingon'"],
        dict(encoding='klingon'),
    ),
    'a column that is none': (
        file('a.jsonl', jsonl(ROWS)),
        ["one of ['id', 'text']", "'body'"],
        dict(column='body'),
    ),
    'a picture': (file('a.txt', b'\x89PNG\r\n\x1a\n\0\0'), ['must be UTF-8', '0x89 at 0']),
    'a zero byte': (file('a.txt', b'ab\0c'), ['must not be binary', 'at 2', 'utf-16']),
    'UTF-16 without a mark': (
        file('a.txt', 'plain English', 'utf-16-le'),
        ['must not be binary', 'utf-16-le'],
    ),
    'feather': (
        lambda f: (pyarrow.feather.write_feather(FRAME, f / 'a.feather') or f / 'a.feather', 0),
        ['must end in one of', 'read_feather'],
    ),
    'arrow': (file('a.arrow', b'ARROW1'), ['must end in one of', 'Dataset.from_file']),
    'docx': (file('a.docx', b'PK\3\4'), ['must end in one of', 'save it as .txt']),
    'zip without a suffix': (file('data', b'PK\3\4'), ['must end in one of', 'unpack it']),
    'unknown suffix': (file('a.novel', 'text'), ['must end in one of', 'a.novel', 'rename it']),
    'nothing': (file('a.txt', b''), ['must hold text', 'a.txt']),
    'one character': (file('a.txt', 'a'), ['must hold text', 'give a longer text']),
    'two rows': (file('a.jsonl', jsonl(ROWS[:2])), ['must hold text', 'at least three documents']),
    'a table without rows': (file('a.csv', 'text\n'), ['must hold text']),
    'folder of nothing': (several({'.hidden': 'a', 'a.png': b''}), ['must hold files', 'got none']),
    'folder with a test alone': (
        several({'test.jsonl': jsonl(ROWS)}),
        ["one called 'train'", "['test']"],
    ),
    'no path': (given(lambda: ''), ['an empty one']),
    'no rows': (given(lambda: []), ['an empty list']),
    'a list of paths as strings': (
        lambda f: ([str(file('a.txt', SIMPLE)(f)[0])], 0),
        ['name files', 'Path(p)'],
    ),
    'a dict of columns': (given(lambda: dict(text=TEXTS)), ["keys ['text']"]),
    'bytes': (given(lambda: b'abc'), ['got bytes']),
    'numbers': (given(lambda: [1, 2, 3]), ['neither text nor row: 3', 'list row 1']),
}


@pytest.mark.parametrize('what', REFUSED)
def test_refused(what, tmp_path):
    make, fragments, *more = REFUSED[what]
    data, _ = make(tmp_path)
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        load_text(data, **(more[0] if more else {}))
    for fragment in fragments:
        assert fragment in str(error.value), str(error.value)


# parts


def as_rows(texts):
    return [dict(text=text) for text in texts]


OWN = {  # names of the three parts of a folder -> how they are written
    'files': ('train.jsonl', 'validation.jsonl', 'test.jsonl'),
    'short names': ('train.jsonl.gz', 'val.jsonl', 'test.jsonl.xz'),
    'names within': ('wiki.train.jsonl', 'wiki-dev.jsonl', 'wiki_test_0.jsonl'),
    'shards': (
        'data/train-00000-of-00001.jsonl',
        'data/validation-00000-of-00001.jsonl',
        'data/test-00000-of-00001.jsonl',
    ),
    'folders': ('train/a.jsonl', 'validation/a.jsonl', 'test/b/a.jsonl'),
}


@pytest.mark.parametrize('how', [*OWN, 'saved', 'dict', 'paths', 'hub'])
def test_own_parts_stay(how, tmp_path, monkeypatch):
    "Held-out parts are exactly the user's, copies included; train loses what they hold."
    held = [*parts[1], parts[1][0]], [*parts[2], ' ', parts[1][1]]
    mine = dict(
        train=as_rows([*parts[0], parts[1][0], parts[0][0], *parts[2][:2]]),
        validation=as_rows(held[0]),
        test=as_rows(held[1]),
    )
    data = datasets.DatasetDict(
        {part: datasets.Dataset.from_list(rows) for part, rows in mine.items()}
    )
    if how == 'saved':
        data.save_to_disk(tmp_path / 'saved')
    elif how == 'hub':
        streams = datasets.IterableDatasetDict(
            {k: v.to_iterable_dataset() for k, v in data.items()}
        )
        monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **how: streams)
        data = 'owner/name'
    elif how != 'dict':
        for name, rows in zip(OWN.get(how, OWN['files']), mine.values()):
            pack = {'gz': gzip.compress, 'xz': lzma.compress}.get(name.rsplit('.')[-1], bytes)
            write(tmp_path / 'own' / name, pack(jsonl(rows).encode()))
        data = (
            tmp_path / 'own'
            if how in OWN
            else {part: tmp_path / 'own' / name for part, name in zip(mine, OWN['files'])}
        )
    corpus = load_text(tmp_path / 'saved' if how == 'saved' else data)
    assert (corpus.train, corpus.validation) == (parts[0], held[0])
    assert corpus._test == [text for text in held[1] if text.strip()]
    check_counts(corpus, {'duplicate': 1, 'in another part': 3, 'empty': 1}, 200 + 21 + 21)


def test_parts_are_those_of_datasets(tmp_path):
    for names in OWN.values():
        folder = tmp_path / names[0].replace('/', '_')
        for name, texts in zip(names, parts):
            write(folder / name, jsonl(as_rows(texts)))
        if names[0].endswith('gz'):
            continue
        theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / 'cache'))
        ours = load_text(folder)
        assert {part: len(rows) for part, rows in theirs.items()} == dict(
            train=len(ours.train), validation=len(ours.validation), test=len(ours._test)
        )


@pytest.mark.parametrize('missing', ['validation', 'test'])
@pytest.mark.parametrize('whole', [False, True])
def test_a_missing_part_is_cut_from_train_and_said(missing, whole, tmp_path, caplog):
    there = 'test' if missing == 'validation' else 'validation'
    train = '\n\n'.join(parts[0]) if whole else jsonl(as_rows(parts[0]))
    write(tmp_path / 'own' / ('train.txt' if whole else 'train.jsonl'), train)
    write(tmp_path / 'own' / f'{there}.jsonl', jsonl(as_rows(parts[2])))
    corpus = load_text(tmp_path / 'own')
    found = dict(validation=corpus.validation, test=corpus._test)
    assert found[there] == parts[2] and found[missing]
    if whole:
        assert sum(map(len, corpus.train + found[missing])) == len(train)
    else:
        assert sorted(corpus.train + found[missing]) == sorted(parts[0])
    assert f'{missing} cut from train' in caplog.text
    assert corpus.card()['data_notes'] == [f'{missing} cut from train']


def test_files_without_a_part(tmp_path):
    "Beside a train they are left out and said; beside a test alone they are train."
    for name, texts in zip(('train', 'val', 'test'), parts):
        write(tmp_path / 'a' / f'{name}.jsonl', jsonl(as_rows(texts)))
    write(tmp_path / 'a' / 'vocab.txt', 'a\nb\n')
    corpus = load_text(tmp_path / 'a')
    assert (
        corpus.train == parts[0]
        and 'files left out, for their names say no part: vocab.txt' in corpus.card()['data_notes']
    )
    write(tmp_path / 'b' / 'corpus.jsonl', jsonl(as_rows(parts[0])))
    write(tmp_path / 'b' / 'test.jsonl', jsonl(as_rows(parts[2])))
    assert load_text(tmp_path / 'b')._test == parts[2]
    assert [
        part_of(tmp_path.__class__(n)) for n in ('latest.txt', 'contest/a.txt', 'train_test.txt')
    ] == [''] * 3


def test_a_small_bad_part_does_not_hide_behind_a_large_one():
    with pytest.raises(ValueError, match='in dict: neither text nor row: 2, first in test row 21'):
        load_text(dict(train=PLAIN * 5, test=[*parts[2], 1, 2]))


def test_chats_keep_their_parts(tmp_path, caplog):
    train, test = chats[:200], [*chats[200:], chats[200]]
    train = [
        *train,
        train[0],
        dict(chats[220], output='another answer'),
        dict(instruction='?', output=None),
    ]
    write(tmp_path / 'own' / 'train.jsonl', jsonl(train))
    write(tmp_path / 'own' / 'test.json', json.dumps(test))
    want = load_chats(tmp_path / 'own')
    asked = [question(chat['messages']) for chat in want._test]
    assert [chat['output'] for chat in want._test] == [row['output'] for row in test]
    assert not {*asked} & {question(chat['messages']) for chat in want.train + want.validation}
    check_counts(want, {'duplicate': 1, 'in another part': 1, 'without an answer': 1}, 200 + 41)
    for data in (
        dict(train=train, test=test),
        dict(train=(row for row in train), test=datasets.Dataset.from_list(test)),
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test)
        ),
    ):
        same = load_chats(data)
        assert [c['messages'] for c in same.train] == [c['messages'] for c in want.train]
        assert [c['messages'] for c in same._test] == [c['messages'] for c in want._test]
        assert ' of 244 rows, ' in same.source and same.key in same.source


def test_pairs_keep_their_parts(tmp_path):
    row = lambda a, b: dict(sentence1=f'sentence {a}', sentence2=f'sentence {b}')
    train = [row(2 * i, 2 * i + 1) for i in range(100)]
    test = [row(1000, 1001), row(1000, 1001), row(1002, 1003)]
    # a chain that leads into the test part: each of its pairs must go
    train += [row(500, 501), row(501, 502), row(502, 1000), train[0], row(7, 7)]
    write(
        tmp_path / 'own' / 'train.csv',
        csv_text([r.values() for r in train], ('sentence1', 'sentence2')),
    )
    write(tmp_path / 'own' / 'test.jsonl', jsonl(test))
    want = load_pairs(tmp_path / 'own')
    assert want._test == [tuple(r.values()) for r in test]
    assert sorted(want.train + want.validation) == sorted(tuple(r.values()) for r in train[:100])
    check_counts(want, {'duplicate': 1, 'in another part': 3, 'no pair': 1}, 103)
    memory = dict(train=[tuple(r.values()) for r in train], test=datasets.Dataset.from_list(test))
    assert load_pairs(memory).key == want.key
    few = load_pairs(memory, max_pairs=10)
    assert few.train == want.train[:10]
    check_counts(
        few,
        {
            'duplicate': 1,
            'in another part': 3,
            'no pair': 1,
            'over the limit': len(want.train) - 10,
        },
        10 + len(want.validation) + 3,
    )


@pytest.mark.parametrize(
    'load, good, odd, reason',
    [
        (load_chats, chats, dict(messages='no list'), 'no conversation'),
        (load_chats, chats, dict(messages=[dict(role='oracle', content='a')]), 'no conversation'),
        (load_chats, chats, dict(instruction=['a'], output='b'), 'no conversation'),
        (load_chats, chats, dict(title='a'), 'no conversation'),
        (
            load_pairs,
            [dict(source=a, target=b) for a, b in zip(PLAIN, TEXTS)],
            dict(source=['a', 'b'], target='c'),
            'no pair of columns',
        ),
        (
            load_pairs,
            [dict(source=a, target=b) for a, b in zip(PLAIN, TEXTS)],
            dict(title='a', text='b'),
            'no pair of columns',
        ),
    ],
)
def test_faults_of_chats_and_pairs(load, good, odd, reason, tmp_path, caplog):
    path = write(tmp_path / 'a.jsonl', jsonl([*good[:100], odd, *good[100:]]))
    corpus = load(path)
    check_counts(corpus, {reason: 1}, 240)
    assert f'{reason}: 1, first in a.jsonl line 101' in caplog.text
    write(path, jsonl([*good[:9], odd]))
    with pytest.raises(
        ValueError, match=rf'1 of 10 \(10.0%\) in .*{reason}: 1, first in a.jsonl line 10 '
    ):
        load(path)
    assert load(path, max_dropped=0.1).rows.kept == 9


def test_images_keep_their_parts():
    pictures = [Image.new('L', (4, 4), i) for i in range(60)]
    mine = dict(
        train=[*pictures[:40], pictures[0], pictures[50]],
        validation=pictures[40:50],
        test=[*pictures[50:], pictures[50]],
    )
    found = load_images(mine)
    assert [len(found.train), len(found.validation), len(found._test)] == [40, 10, 11]
    check_counts(found, dict(duplicate=2), 61)
    data = datasets.DatasetDict(
        {k: datasets.Dataset.from_dict(dict(image=v)) for k, v in mine.items()}
    )
    assert load_images(data).key == found.key
    assert load_images({k: iter(v) for k, v in mine.items()}).key == found.key


# limits, encodings, streams


@pytest.mark.parametrize('limit', [500, 1000, 7777])
def test_max_chars_is_in_characters(limit, tmp_path):
    path = write(tmp_path / 'a.txt', CHINESE * 20)
    assert sum(map(len, everything(load_text(path, limit)))) in (
        limit,
        limit - 1,
        limit - 2,
    )  # stripped
    pool = load_text(PLAIN, limit)
    assert limit - 5 < sum(map(len, everything(pool))) <= limit
    check_counts(pool, {}, len(everything(pool)))
    own = load_text(dict(train=PLAIN, validation=parts[1], test=parts[2]), limit)
    for part, texts in zip((own.validation, own._test), parts[1:]):
        assert ''.join(part) == ''.join(texts)[:limit].strip()


@pytest.mark.parametrize('paragraphs', ['many', 'early', 'late', 'wide', 'none'])
def test_a_long_text_is_as_a_short_one(paragraphs, tmp_path, monkeypatch):
    "The oracle is a `str`: what it strips, how it is cut at a limit, where the parts begin."
    draw = random.Random(paragraphs)
    words = [*PLAIN[0].split(), '恩尼格玛', '😀', 'é', '\u3000', '\x85', '\n', '\r\n \u2003\n']
    few = [c for c in words if '\n' not in c]
    body = ' '.join(draw.choices(words if paragraphs == 'many' else few, k=70_000))
    wide = 'x' * 285_000 + '\n\n' + '😀' * 47_000 + '\n\n' + '😀' * 3000
    text = dict(early=f'a\n\n{body}', late=f'{body}\r\r\xa0z', wide=wide).get(paragraphs, body)
    path = write(tmp_path / 'a.txt', f'\ufeff\u3000\n{text}\x85 \r\n')
    for limit in (0, 1, 12_345, 150_000, 10**9):
        found = []
        for long in (1, 10**9):
            monkeypatch.setattr(texts_of, 'LONG', long)
            try: corpus = load_text(path, limit)
            except ValueError as e: found.append(str(e))
            else:
                assert isinstance(corpus.train, list) == (long > 1)
                clean = remove_leaks(corpus, 'remove')[0] if limit == 12_345 else corpus
                found.append([corpus.card(), everything(corpus), everything(clean)])
        assert found[0] == found[1]


def test_a_guess_is_said(tmp_path, caplog):
    path = write(tmp_path / 'a.txt', SIMPLE, 'gb18030')
    card = load_text(path).card()
    assert card['encodings'] == {'gb18030': 1} and 'a.txt read as gb18030, a guess' in caplog.text
    caplog.clear()
    told = load_text(path, encoding='gb18030')
    assert told.card()['encodings'] == {'gb18030': 1} and not caplog.text
    assert told.key == load_text(write(tmp_path / 'b.txt', SIMPLE)).key


def test_the_hub_streams(monkeypatch):
    "No more is read than asked for; what goes wrong on the way says what was asked."
    read = []

    def rows():
        for i in range(10**9):
            read.append(i)
            yield dict(text=PLAIN[i % 240] + str(i))

    monkeypatch.setattr(
        datasets, 'load_dataset', lambda *args, **how: datasets.IterableDataset.from_generator(rows)
    )
    corpus = load_text('owner/name:config', 200_000)
    assert sum(map(len, everything(corpus))) <= 200_000 and len(read) < 5000
    monkeypatch.setattr(
        datasets,
        'load_dataset',
        lambda *args, **how: 1 / 0 if False else (_ for _ in [OSError]).throw(OSError('no net')),
    )
    with pytest.raises(ConnectionError, match="got 'owner/name': OSError: no net"):
        load_text('owner/name')


def test_names_of_data_in_memory():
    a, b, c = load_text(TEXTS), load_text(tuple(TEXTS)), load_text(TEXTS[1:])
    assert a.source == f'list of 240 rows, {a.key}' and b.source == f'tuple of 240 rows, {b.key}'
    assert a.key == b.key != c.key
