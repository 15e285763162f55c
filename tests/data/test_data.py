"""Streams and their readers: no TensorFlow in this process."""

import dataclasses
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from research import freeze
from research.core import configs
from research.core.errors import Invalid, UserError
from research.data import batches, cache, objectives, shards, spec
from research.data.frozen import permuted
from research.data.mixtures import Curriculum, Mixture
from research.data.spec import from_spec
from research.data.streams import Stream


def frozen(tmp_path, sizes=(37, 20, 5), length=8, passes=1, examples=None, offset=0, prefix=False):
  """A stream whose example i holds i in its first token, written by the writer itself."""
  stream = Stream(lengths={'targets': length}, passes=1, examples=examples)
  object.__setattr__(stream, 'passes', passes)
  folder = tmp_path / 'stream'
  folder.mkdir()
  shards.write_json(folder / 'header.json', {'vocab_size': 1000, 'vocabulary': 'numbers'})
  for number in range(passes):
    first = 0
    for piece, n in enumerate(sizes):
      tokens = np.tile(np.arange(first, first + n)[:, None], (1, length)) + 500 * number + offset
      ones = np.ones_like(tokens)
      last = piece == len(sizes) - 1
      with shards.Shard(folder, number, piece, np.ones(1000, np.int64), last) as shard:
        rows = {'decoder_target_tokens': tokens, 'decoder_loss_weights': ones}
        shard.write(rows | ({'decoder_causal_attention': ones} if prefix else {}))
      first += n
  return batches.Frozen(folder, stream)


def ids(batch):
  return batch['decoder_target_tokens'][:, 0].tolist()


@pytest.mark.parametrize('n', [1, 2, 3, 17, 64, 1000])
def test_permuted_is_a_permutation_that_its_key_names(n):
  a = permuted(np.arange(n), n, key=5)
  assert sorted(a.tolist()) == list(range(n))
  np.testing.assert_array_equal(a, permuted(np.arange(n), n, key=5))
  if n > 10:
    assert (a != permuted(np.arange(n), n, key=6)).any()


def test_permutations_are_uniform_enough():
  # Chi-square of where index 0 of 16 goes, over 4000 keys: mean 15, standard deviation 5.5.
  at = np.bincount([permuted(np.array([0]), 16, key=k)[0] for k in range(4000)], minlength=16)
  assert ((at - 250) ** 2 / 250).sum() < 45


def mixture_of(tmp_path, rates=None, sizes=(40, 100), **fields):
  parts = {}
  for i, n in enumerate(sizes):
    (tmp_path / str(i)).mkdir()
    parts[f's{i}'] = frozen(tmp_path / str(i), sizes=(n,), offset=200 * i)
  made = Mixture({name: p.stream for name, p in parts.items()}, rates=rates, **fields)
  return batches.FrozenMixture(made, parts)


def test_a_mixture_of_prefixes_and_none(tmp_path):
  parts = {}
  for name, prefix in (('causal', False), ('span', True)):
    (tmp_path / name).mkdir()
    parts[name] = frozen(tmp_path / name, offset=500 * prefix, prefix=prefix)
  mixed = batches.FrozenMixture(Mixture({name: p.stream for name, p in parts.items()}), parts)
  batch = batches.batch_at(mixed, 64, 0, 0)
  of_span = batch['decoder_target_tokens'] >= 500
  assert 0 < of_span.mean() < 1
  np.testing.assert_array_equal(batch['decoder_causal_attention'], of_span)


def test_a_mixture_draws_exact_shares_and_counts_epochs(tmp_path):
  mixed = mixture_of(tmp_path, rates={'s0': 3, 's1': 1})
  assert mixed.rates == {'s0': 0.75, 's1': 0.25}
  seen = np.array([i for k in range(64) for i in ids(batches.batch_at(mixed, 64, 2, k))])
  assert (seen < 200).sum() == 3072
  assert mixed.epochs(4096) == {'s0': 3072 / 40, 's1': 1024 / 100}
  # Every example of a part comes equally often, to one.
  counts = np.bincount(seen[seen < 200], minlength=40)
  assert counts.max() - counts.min() <= 1
  # Short runs have about the shares as well.
  assert 0.6 < (seen[:256] < 200).mean() < 0.9


def test_a_mixture_resumes_and_is_shared_by_hosts(tmp_path):
  mixed = mixture_of(tmp_path)
  assert mixed.rates == {'s0': round(4096 * 40 / 140) / 4096, 's1': round(4096 * 100 / 140) / 4096}
  whole = [ids(batches.batch_at(mixed, 12, 4, i)) for i in range(400)]
  resumed = batches.batches(mixed, 12, seed=4, start=390)
  assert [ids(next(resumed)) for _ in range(10)] == whole[390:]
  shares = [ids(batches.batch_at(mixed, 12, 4, 399, p, 3)) for p in range(3)]
  assert [i for share in shares for i in share] == whole[399]
  held = np.concatenate([ids(b) for b in batches.eval_batches(mixed, 7)])
  assert held[:140].tolist() == [*range(40), *range(200, 300)]


def test_temperature_and_limit_shape_a_mixtures_shares():
  stream = Stream()
  examples = {'a': 100, 'b': 900}
  shares = lambda **fields: Mixture({'a': stream, 'b': stream}, **fields).shares(examples)
  assert shares() == {'a': 0.1, 'b': 0.9}
  assert shares(temperature=2) == {'a': 0.25, 'b': 0.75}
  assert shares(maximum=300) == {'a': 0.25, 'b': 0.75}
  with pytest.raises(Invalid, match='Did you mean a'):
    shares(rates={'aa': 1, 'b': 2})
  with pytest.raises(Invalid, match='has lengths'):
    Mixture({'a': stream, 'b': Stream(lengths={'targets': 64})})


def test_a_curriculum_grows_batches_over_the_same_order(tmp_path):
  stream = frozen(tmp_path)
  plan = Curriculum(16, ((5, 2, 4), (4, 8, 2)))
  straight = [i for k in range(8) for i in ids(batches.batch_at(stream, 16, 3, k))]
  grown, shapes = [], []
  for step in range(12):
    batch = batches.batch_at(stream, plan, 3, step)
    shapes.append(batch['decoder_target_tokens'].shape)
    cut = 8 // shapes[-1][1]
    grown += ids(batch)[::cut]
  assert shapes == [(8, 2)] * 5 + [(16, 4)] * 4 + [(16, 8)] * 3
  assert grown == straight[: len(grown)]
  resumed = batches.batches(stream, plan, 3, start=7)
  assert ids(next(resumed)) == ids(batches.batch_at(stream, plan, 3, 7))
  assert plan.examples(12) == len(grown) == 5 * 2 + 4 * 8 + 3 * 16


def test_a_cut_document_starts_again_at_position_zero():
  batch = {
    'decoder_target_tokens': np.array([[5, 6, 7, 8, 9, 0]]),
    'decoder_segment_ids': np.array([[1, 1, 1, 1, 2, 0]]),
    'decoder_positions': np.array([[0, 1, 2, 3, 0, 0]]),
  }
  short = batches.shortened(batch, 2)
  assert short['decoder_positions'].tolist() == [[0, 1, 2], [0, 0, 0]]
  with pytest.raises(UserError, match='cannot be cut into 4'):
    batches.shortened(batch, 4)


def test_every_epoch_shows_every_example_once_in_another_order(tmp_path):
  stream = frozen(tmp_path)
  stream_of = batches.batches(stream, 31, seed=1)
  seen = [i for _ in range(6) for i in ids(next(stream_of))]
  epochs = [seen[:62], seen[62:124], seen[124:186]]
  assert all(sorted(e) == list(range(62)) for e in epochs)
  assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_index_alone(tmp_path):
  stream = frozen(tmp_path)
  straight = batches.batches(stream, 12, seed=4)
  whole = [ids(next(straight)) for _ in range(12)]
  resumed = batches.batches(stream, 12, seed=4, start=7, prefetch=0)
  assert [ids(next(resumed)) for _ in range(5)] == whole[7:]
  assert ids(next(batches.batches(stream, 12, seed=5))) != whole[0]


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
def test_hosts_share_the_same_global_batches(tmp_path, hosts):
  stream = frozen(tmp_path)
  whole = batches.batches(stream, 12, seed=4)
  shares = [
    batches.batches(stream, 12, seed=4, process_index=p, process_count=hosts) for p in range(hosts)
  ]
  for _ in range(9):
    assert ids(next(whole)) == [i for s in shares for i in ids(next(s))]


def test_epochs_cycle_through_the_frozen_passes(tmp_path):
  stream = frozen(tmp_path, passes=2)
  stream_of = batches.batches(stream, 62, seed=0)
  passes = [min(ids(next(stream_of))) >= 500 for _ in range(4)]
  assert passes == [False, True, False, True]


def test_a_batch_must_divide_by_the_hosts(tmp_path):
  with pytest.raises(UserError, match='does not divide equally among 3'):
    next(batches.batches(frozen(tmp_path), 10, seed=0, process_count=3))


def test_evaluation_sees_everything_once_and_pads_with_weight_zero(tmp_path):
  stream = frozen(tmp_path)
  made = list(batches.eval_batches(stream, 16))
  assert all(b['decoder_target_tokens'].shape == (16, 8) for b in made)
  weights = np.concatenate([b['decoder_loss_weights'][:, 0] for b in made])
  tokens = np.concatenate([b['decoder_target_tokens'][:, 0] for b in made])
  assert tokens[weights > 0].tolist() == list(range(62))
  halves = [list(batches.eval_batches(stream, 16, p, 2)) for p in range(2)]
  for batch, *shares in zip(made, *halves, strict=True):
    assert ids(batch) == ids(shares[0]) + ids(shares[1])


def test_examples_caps_a_stream_without_changing_its_start(tmp_path):
  stream = frozen(tmp_path, examples=40)
  assert len(stream) == 40
  assert ids(stream.examples(range(40))) == list(range(40))
  assert len(stream.manifest['shards'][0]) == 2


def test_an_altered_or_missing_shard_is_named(tmp_path):
  stream = frozen(tmp_path)
  path = stream.folder / 'pass0-00001.bin'
  good = path.read_bytes()
  path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
  with pytest.raises(UserError, match=r'pass0-00001.bin was altered'):
    batches.Frozen(stream.folder, stream.stream)
  path.write_bytes(good[:-1])
  with pytest.raises(UserError, match=r'pass0-00001.bin is damaged: it has 479 bytes, not 480'):
    batches.Frozen(stream.folder, stream.stream)
  path.unlink()
  with pytest.raises(UserError, match=r'pass0-00001.bin is missing'):
    batches.Frozen(stream.folder, stream.stream)


def test_an_error_of_the_prefetching_thread_reaches_the_reader():
  def items():
    yield 1
    raise OSError('disk')

  made = batches.prefetched(items(), 2)
  assert next(made) == 1
  with pytest.raises(OSError, match='disk'):
    next(made)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'task': 'casual_lm'}, r'Did you mean causal_lm'),
    ({'task': 'mine', 'module': 'no.such.module'}, r'Stream.module: there is no Python module'),
    ({'lengths': {'targets': -4}}, r"Stream.lengths: 'targets' is -4"),
    ({'lengths': {'inputs': 64}}, r"needs exactly \['targets'\]"),
    ({'split': 'validaton'}, r'Did you mean validation'),
    ({'architecture': 'encoder'}, r'causal_lm runs as decoder'),
    ({'examples': 0}, r'Stream.examples'),
    ({'passes': 2}, r'causal_lm is not random'),
    (
      {'task': 'span_corruption', 'lengths': {'inputs': 512, 'targets': 64}},
      r'with .inputs. of 512 needs 114',
    ),
    ({'task': 'span_corruption', 'lengths': {'inputs': 4096}}, r'extra_ids.*too few'),
  ],
)
def test_a_bad_stream_is_refused_in_a_sentence(fields, message):
  with pytest.raises(Invalid, match=message):
    Stream(**fields)


@pytest.mark.parametrize('name', sorted(objectives.OBJECTIVES))
def test_every_objective_has_a_gin_file_that_makes_its_stream(tmp_path, name):
  file = tmp_path / 'stream.gin'
  file.write_text(
    'from __gin__ import dynamic_registration\nfrom research.data import streams\n'
    f"include 'gin/objectives/{name}.gin'\nRUN = @streams.Stream\n"
  )
  files = [f'FILES={str(file)!r}'] if objectives.OBJECTIVES[name].reads != 'text' else []
  stream = configs.load(str(file), files).build()
  assert stream.name == name
  assert stream.task == objectives.OBJECTIVES[name]()
  assert from_spec(json.loads(json.dumps(stream.spec()))) == stream


def test_a_bare_name_of_a_spec_means_one_class():
  classes = {}
  for name in spec._MODULES:
    module = importlib.import_module(name)
    for kind in vars(module).values():
      if dataclasses.is_dataclass(kind) and kind.__module__ == name:
        assert classes.setdefault(kind.__name__, kind) is kind


def test_a_mixture_in_gin_has_a_scope_for_every_stream(tmp_path):
  (tmp_path / 'book.txt').write_text('text')
  file = tmp_path / 'mixed.gin'
  file.write_text(f"""
from __gin__ import dynamic_registration
include 'gin/runs/tiny.gin'
from research.data import corpora
from research.training import run
from research.data import mixtures
from research.data import streams
run.Run.train = @mixtures.Mixture()
mixtures.Mixture.streams = {{'code': @code/streams.Stream(), 'prose': @prose/streams.Stream()}}
mixtures.Mixture.temperature = 2.0
prose/streams.Stream.corpus = @corpora.TextFiles()
corpora.TextFiles.files = '{tmp_path}/*.txt'
""")
  train = configs.load(str(file), []).build().train
  kinds = {name: type(s.corpus).__name__ for name, s in train.streams.items()}
  assert kinds == {'code': 'PythonSources', 'prose': 'TextFiles'}
  assert train.temperature == 2.0
  found = freeze.configured([str(file)], [])
  assert [(s.corpus.name, s.split) for s in found] == [
    ('python_sources', 'train'),
    ('text', 'train'),
    ('python_sources', 'validation'),
  ]


def test_the_file_of_an_objective_is_a_stream_by_itself():
  (found,) = freeze.configured(['gin/objectives/ul2.gin'], ['Stream.examples=100', 'INPUTS=64'])
  assert (found.name, found.examples, found.lengths) == ('ul2', 100, {'inputs': 64, 'targets': 64})
  with pytest.raises(UserError, match=r'no RUN = @'):
    freeze.configured(['gin/optimizers/adamw.gin'], [])


def test_freeze_finds_the_streams_of_a_run_and_names_what_is_wrong(tmp_path, frozen_in_a_process):
  found = freeze.configured(['gin/runs/tiny.gin'], ['streams.Stream.seed=3'])
  assert [(s.split, s.seed) for s in found] == [('train', 3), ('validation', 3)]
  with pytest.raises(UserError, match=r'Did you mean gin/runs/tiny.gin'):
    freeze.main(['--gin_file=gin/runs/tinny.gin'])
  with pytest.raises(UserError, match=r'casual_lm.*Did you mean causal_lm'):
    freeze.configured(['gin/runs/tiny.gin'], ["streams.Stream.task='casual_lm'"])
  with pytest.raises(UserError, match='name a run'):
    freeze.main([])
  blocked = tmp_path / 'file'
  blocked.write_text('')
  with pytest.raises(UserError, match='set ISOFLOP_CACHE'):
    cache.open_stream(Stream(), blocked / 'cache')


def test_a_stream_survives_its_spec():
  from research.data.vocabularies import SentencePiece

  stream = Stream(task='span_corruption', lengths={'inputs': 64}, vocabulary=SentencePiece())
  again = from_spec(json.loads(json.dumps(stream.spec())))
  assert again == stream
  assert again.key() == stream.key()
  assert stream.lengths['targets'] == 14
  assert Stream(examples=5).key() == Stream(examples=9).key() != Stream(seed=1).key()


def test_reading_imports_neither_tensorflow_nor_seqio_nor_jax():
  code = (
    'import sys; from research.data import batches; '
    "print([m for m in ('tensorflow', 'seqio', 't5', 'jax') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'
