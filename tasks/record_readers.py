"""Corpora in files of records: Parquet, Arrow, TFRecord, ArrayRecord and TensorFlow Datasets."""

import json
import pathlib

from research.core.errors import UserError, first_line
from research.core.storage import LFS_POINTER
from research.data import corpora
from tasks.files import Broken, Unreadable, compression, example, fields, files, local

# What pyarrow raises besides its own errors, on files that are damaged in the middle.
_ARROW_ERRORS = (ValueError, LookupError, TypeError, OverflowError, MemoryError)


def read_parquet(corpus: corpora.Parquet, dropped):
  import pyarrow
  import pyarrow.parquet

  for split, path in files(corpus):
    broken = Broken(corpus, dropped, path)
    with broken.reading(*_ARROW_ERRORS, pyarrow.ArrowException), local(path) as file:
      refuse_pointer(file)
      table = pyarrow.parquet.ParquetFile(file)
      wanted = [c for c in (corpus.prompt, corpus.field) if c]
      columns = [c for c in wanted if c in table.schema_arrow.names]
      if len(columns) < len(wanted):
        columns = table.schema_arrow.names[:1]
      number = 0
      for batch in table.iter_batches(1024, columns=columns if columns == wanted else None):
        for record in batch.to_pylist():
          number += 1
          yield from fields(corpus, broken, split, record, f'row {number}')


def refuse_pointer(path: str):
  """Raises `Unreadable` for an empty file or a Git LFS pointer, which every format's reader words otherwise."""
  with open(path, 'rb') as file:
    head = file.read(len(LFS_POINTER))
  if not head:
    raise EOFError('it is empty')
  if head == LFS_POINTER:
    raise Unreadable('it is a Git LFS pointer and not the data: fetch it with git lfs pull')


def arrow_files(path: str) -> list[str]:
  """The files of a data set: those its state.json names, for `datasets` leaves caches beside them.

  Raises:
    Unreadable: the folder holds no data set, or its state.json is damaged.
  """
  folder = pathlib.Path(path)
  if '://' in path or not folder.is_dir():
    return [path]
  state = folder / 'state.json'
  if not state.exists():
    found = sorted(map(str, folder.rglob('*.arrow')))
    if not found:
      raise Unreadable('it is a folder without .arrow files, and no data set of Hugging Face')
    return found
  try:
    names = [file['filename'] for file in json.loads(state.read_text())['_data_files']]
    paths = [str(folder / name) for name in names]
  except (ValueError, LookupError, TypeError, RecursionError) as e:
    why = "its state.json is damaged or not that of datasets.save_to_disk (no list '_data_files')"
    raise Unreadable(why) from e
  missing = [file for file in paths if not pathlib.Path(file).is_file()]
  if missing or not paths:
    named = pathlib.Path(missing[0]).name if missing else 'no file'
    raise Unreadable(f'its state.json names {named}, which is not there')
  return paths


def read_arrow(corpus: corpora.HuggingFace, dropped):
  import pyarrow

  for split, path in files(corpus):
    folder = Broken(corpus, dropped, path)
    found = []
    with folder.reading():
      found = arrow_files(path)
    for file in found:
      broken = Broken(corpus, dropped, file)
      with broken.reading(*_ARROW_ERRORS, pyarrow.ArrowException), local(file) as copy:
        refuse_pointer(copy)
        number = 0
        with pyarrow.memory_map(copy) as source:
          for batch in pyarrow.ipc.open_stream(source):
            for record in batch.to_pylist():
              number += 1
              yield from fields(corpus, broken, split, record, f'row {number}')


def read_tfrecord(corpus: corpora.TFRecords, dropped):
  import tensorflow as tf

  for split, path in files(corpus):
    broken = Broken(corpus, dropped, path)
    with broken.reading():
      kind = 'GZIP' if compression(path) == 'gzip' else ''
      for number, data in enumerate(tf.data.TFRecordDataset(path, kind).as_numpy_iterator(), 1):
        yield from fields(corpus, broken, split, example(data, broken, number), f'record {number}')


def read_array_record(corpus: corpora.ArrayRecords, dropped):
  from array_record.python import array_record_module

  for split, path in files(corpus):
    broken = Broken(corpus, dropped, path)
    with broken.reading(RuntimeError, ValueError), local(path) as file:
      reader = array_record_module.ArrayRecordReader(file)
      for number in range(reader.num_records()):
        record = example(reader.read([number])[0], broken, number + 1)
        yield from fields(corpus, broken, split, record, f'record {number + 1}')
      reader.close()


def read_tfds(corpus: corpora.Tfds, dropped):
  import tensorflow_datasets as tfds

  for split in corpora.SPLITS:
    where = f'{corpus.tfds_name} {getattr(corpus, split)}'
    try:
      dataset = tfds.load(
        corpus.tfds_name,
        split=getattr(corpus, split),
        data_dir=corpus.data_dir,
        download=False,
        shuffle_files=False,
      )
    except Exception as e:
      raise UserError(f'Tfds.tfds_name: {where!r} cannot be opened here: {first_line(e)}.') from e
    broken = Broken(corpus, dropped, where)
    for number, record in enumerate(tfds.as_numpy(dataset), 1):
      yield from fields(corpus, broken, split, record, f'example {number}')
