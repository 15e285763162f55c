"""Folders and buckets: which names are taken, and what a name means."""

import os
import pathlib
import pwd

import pytest

from research.core import storage
from research.core.errors import UserError
from research.data import cache

# Each is taken by a glob or a URL for something else than itself.
SPECIAL = ['a[1]', '[!x]', 'a*b', 'a?b', 'a#1', 'a%20b', 'a%b', 'a|b', 'a\\b', 'gs:', 'a\udcffb']
PLAIN = [
  'plain',
  'a b',
  '~x',
  'ä',
  'a:b',
  'a;b',
  'a&b=1',
  'a{b,c}',
  "a'b",
  '$HOME',
  'a,b',
  '-a',
  'a@b',
]


@pytest.mark.parametrize('name', SPECIAL)
def test_a_folder_of_a_special_name_is_reached_by_a_plain_one(tmp_path, name):
  folder = tmp_path / name / 'checkpoints'
  plain = storage.plain_path(folder)
  assert plain == storage.plain_path(folder)
  assert name not in str(plain)
  (plain / 'file').write_text('here')
  assert (folder / 'file').read_text() == 'here'


@pytest.mark.parametrize('name', PLAIN)
def test_a_folder_of_a_plain_name_is_itself(tmp_path, name):
  assert storage.plain_path(tmp_path / name) == tmp_path / name
  assert not (tmp_path / name).exists()


def test_a_folder_that_no_link_can_be_made_to_is_refused(tmp_path, monkeypatch):
  (tmp_path / f'isoflop-{os.getuid()}').write_text('in the way')
  monkeypatch.setattr(storage.tempfile, 'gettempdir', lambda: str(tmp_path))
  with pytest.raises(
    UserError, match=r"a\[1\]: the path has '\[' in it, and a link to it .* could not"
  ):
    storage.plain_path(tmp_path / 'a[1]')


def test_a_tilde_is_the_home_of_the_user(monkeypatch):
  monkeypatch.setenv('HOME', '/home/of/mine')
  assert storage.place('~/runs') == pathlib.Path('/home/of/mine/runs')
  assert storage.place('runs/~') == pathlib.Path('runs/~')
  with pytest.raises(UserError, match='--workdir=~nobody-at-all/x: there is no such user'):
    storage.place('~nobody-at-all/x')


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
  def nobody(uid):
    raise KeyError(uid)

  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.delenv('ISOFLOP_CACHE', raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', nobody)
  with pytest.raises(
    UserError, match=r'ISOFLOP_CACHE=~/.cache/isoflop: .* no home folder; name it without ~'
  ):
    cache.default_cache()


def test_a_file_url_is_a_folder():
  assert storage.place('file:///data/runs') == pathlib.Path('/data/runs')


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('', "--workdir='' names no folder"),
    ('a\0b', r"--workdir='a\\x00b' names no folder"),
    ('gs:/bucket/x', '--workdir=gs:/bucket/x: the URL of a bucket starts with gs://'),
    ('ftp://x/y', r'--workdir=ftp://x/y: a URL of gs:// or s3:// is wanted, or a folder'),
    ('gs://bucket/a[1]', r"gs://bucket/a\[1\]: a folder of a bucket cannot have '\['"),
    ('gs://bucket/a#1', "a folder of a bucket cannot have '#'"),
  ],
)
def test_what_names_no_place_is_one_sentence(name, says):
  with pytest.raises(UserError, match=says):
    storage.place(name)


def test_a_name_that_cannot_be_a_folder_is_one_sentence(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'--workdir=.*/file/x cannot be written \(Not a directory\)'):
    storage.make(storage.place(str(tmp_path / 'file' / 'x')))
  with pytest.raises(UserError, match=r'cannot be written \(File name too long\)'):
    storage.make(storage.place(str(tmp_path / ('x' * 300))))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / 'run.json'
  storage.write_atomic(path, 'old')

  def full(self, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(OSError, match='No space left'):
    storage.write_atomic(path, 'new')
  assert path.read_text() == 'old'
  assert [file.name for file in tmp_path.iterdir()] == ['run.json']


def test_rows_end_before_a_line_that_was_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xc3')
  assert storage.read_rows(path) == [{'step': 1}, {'step': 2}]


def test_files_are_copied_in_order_and_errors_say_which(tmp_path):
  source, target = tmp_path / 'a', tmp_path / 'b'
  source.mkdir()
  for name in ('x', 'y'):
    (source / name).write_text(name)
  lines = []
  storage.copy_files(source, target, ['y', 'x'], lines.append)
  assert storage.names(target) == {'x', 'y'}
  assert [line.rpartition('/')[2] for line in lines] == ['y', 'x']
  with pytest.raises(UserError, match=r'cannot read .*/a/z: No such file'):
    storage.copy_files(source, target, ['z'], lines.append)
  assert storage.names(tmp_path / 'nowhere') == set()
