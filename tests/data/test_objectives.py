"""Every objective frozen for good and read: by any hosts, after any stop, and by a person."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest

from research import freeze
from research.data import batches
from research.data.corpora import JsonLines
from research.data.objectives import UL2, Denoiser, MaskedLM
from research.data.streams import Stream
from research.data.vocabularies import Bytes
from tasks import freezing

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import
silent = lambda line: None

# One denoiser of each mode: every further one costs seconds of tracing.
MODES = UL2((Denoiser('R', 3, 0.15), Denoiser('S', 0, 0.25), Denoiser('X', 8, 0.5)))
STREAMS = {
  'causal_lm': {'lengths': {'targets': 64}},
  'prefix_lm': {'lengths': {'targets': 64}},
  'span_corruption': {'lengths': {'inputs': 64}, 'passes': 2},
  'ul2': {'task': MODES, 'lengths': {'inputs': 64}},
  'masked_lm': {'task': MaskedLM(whole_word=True), 'lengths': {'targets': 64}},
  'masked_lm, encoder': {'architecture': 'encoder', 'lengths': {'inputs': 64}},
  'fim': {'lengths': {'targets': 64}},
  'instructions': {'lengths': {'targets': 96}},
}


def stream_of(name, folder, **fields):
  """A stream of one objective over 120 short documents, which are two pieces."""
  file = folder / 'pairs.jsonl'
  if not file.exists():
    draw = np.random.default_rng(0)
    words = ['alpha', 'beta', 'gamma', 'delta', 'omega', 'naïve', '北京']
    texts = (
      ' '.join(words[j] for j in draw.integers(0, 7, draw.integers(3, 20))) for _ in range(120)
    )
    rows = ({'prompt': f'number {i}?', 'text': f'{i}: {t}'} for i, t in enumerate(texts))
    file.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  task = name.split(',')[0]
  prompt = 'prompt' if task == 'instructions' else None
  corpus = JsonLines(files=str(file), prompt=prompt, piece_bytes=4000, validation_fraction=1e-9)
  fields = {'task': task, 'vocabulary': Bytes(200), **STREAMS[name], **fields}
  return Stream(corpus=corpus, **fields)


@pytest.fixture(scope='module')
def frozen_of(tmp_path_factory):
  """Objective -> its frozen stream; each is frozen once, in this process."""
  folder, made = tmp_path_factory.mktemp('objectives'), {}

  def frozen(name):
    if name not in made:
      stream = stream_of(name, folder)
      freezing.freeze([stream], folder / 'cache', silent)
      made[name] = batches.Frozen(folder / 'cache' / 'streams' / stream.key(), stream)
    return made[name]

  return frozen


@pytest.mark.parametrize('name', STREAMS)
def test_stopped_anywhere_and_resumed_on_other_hosts_the_tokens_are_the_same(frozen_of, name):
  frozen, size = frozen_of(name), 12
  assert len(frozen.manifest['shards'][0]) > 1
  steps = 5 * len(frozen) // (2 * size)  # two epochs and a half
  straight = batches.batches(frozen, size, seed=7, prefetch=0)
  whole = [next(straight) for _ in range(steps)]
  assert any((whole[0][k] != whole[1][k]).any() for k in whole[0])
  at = 0
  for hosts, until in zip(itertools.cycle((2, 4, 1, 3)), (*range(1, steps, 7), steps)):
    again = batches.Frozen(frozen.folder, frozen.stream)  # as another process opens it
    shares = [batches.batches(again, size, 7, at, p, hosts, prefetch=0) for p in range(hosts)]
    for step in range(at, until):
      parts = [next(share) for share in shares]
      assert all(set(part) == set(frozen.features) for part in parts)
      for key, rows in whole[step].items():
        np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), rows)
    at = until


@pytest.mark.slow
@pytest.mark.parametrize('name', STREAMS)
def test_a_freeze_that_was_stopped_ends_with_the_same_hashes(frozen_of, name, tmp_path):
  whole = frozen_of(name)
  folder = tmp_path / 'streams' / whole.folder.name
  shutil.copytree(whole.folder, folder)
  # As a kill leaves it: the last shard half written, the one before it not there (another worker's).
  *_, gone, last = sorted(folder.glob('pass*.json'))
  half = last.with_suffix('.bin').read_bytes()
  last.with_suffix('.partial').write_bytes(half[: len(half) // 2])
  for facts in (gone, last):
    facts.with_suffix('.bin').unlink()
    facts.unlink()
  shutil.copytree(whole.folder.parent.parent / 'corpora', tmp_path / 'corpora')
  freezing.freeze([whole.stream], tmp_path, silent)
  assert batches.Frozen(folder, whole.stream).fingerprint == whole.fingerprint


SHOWN = {
  'causal_lm': r'decoder target  \d+: .*<eos>$',
  'prefix_lm': r'decoder target  ‹.+›.+<eos>\n  decoder prefix  the first \d+ inputs see each',
  'span_corruption': r'encoder input   .*<extra_id_0>.*<eos>\n  decoder target  <extra_id_0>.*<eos>$',
  'ul2': r'encoder input   \[S\].*<eos>\n  decoder target  [^<]+<eos>$',
  'masked_lm': r'decoder input   .*<mask>.*\n  decoder target  .*‹.*<eos>›$',
  'masked_lm, encoder': r'encoder input   .*<mask>.*\n  encoder target  .*‹.*<eos>›$',
  'fim': r'decoder target  <PRE>.*<SUF>.*<MID>.*<eos>$',
  'instructions': r'decoder target  ‹number (\d+)\?›\1: .*<eos>$',
}


@pytest.mark.parametrize('name', STREAMS)
def test_a_decoded_example_of_every_objective_can_be_read(frozen_of, name, capsys):
  frozen = frozen_of(name)
  freeze.report(frozen, frozen.folder.parent.parent, show=len(frozen))
  said = capsys.readouterr().out
  assert re.search(SHOWN[name], said, re.MULTILINE), said[:3000]
  assert 'jsonl: 120 documents, ' in said
  side = 'encoder' if 'encoder_segment_ids' in frozen.features else 'decoder'
  rows = frozen.examples(range(len(frozen)))
  assert said.count('\n part ') == rows[f'{side}_segment_ids'].max(1).sum()
  # What stands outside the marks of no loss is as many tokens as carry loss.
  side = 'encoder' if 'encoder_target_tokens' in rows else 'decoder'
  targets = ''.join(re.findall(rf'^  {side} target  (.*)$', said, re.MULTILINE))
  with_loss = re.sub('‹[^›]*›', '', targets)
  with_loss = re.sub(r'<eos>|<extra_id_\d+>|<PRE>|<SUF>|<MID>|\\x..', '.', with_loss)
  assert len(with_loss.encode()) == rows[f'{side}_loss_weights'].sum()
