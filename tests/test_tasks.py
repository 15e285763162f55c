"""Tasks against seqio and t5 themselves: the wiring may be fast, the tokens must be theirs."""

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import

rng = np.random.default_rng(0)
DOCUMENTS = [rng.integers(3, 259, n, dtype=np.int32) for n in (40, 700, 1, 90, 333, 64, 65, 17)]


@pytest.fixture(scope='module')
def seqio():
  return pytest.importorskip('seqio')


def columns_of(examples):
  return {
    k: (np.concatenate([e[k] for e in examples]), np.array([len(e[k]) for e in examples]))
    for k in examples[0]
  }


def dataset_of(examples):
  import tensorflow as tf

  spec = {k: tf.TensorSpec([None], tf.int32) for k in examples[0]}
  return tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('kind', ['LM', 'PrefixLM', 'EncDec'])
def test_blocks_equal_seqios_feature_converters(seqio, kind, packing):
  from tasks import packing as ours

  draw = np.random.default_rng(1)
  examples = [
    {k: draw.integers(1, 99, draw.integers(1, 13), dtype=np.int32) for k in ('inputs', 'targets')}
    for _ in range(50)
  ]
  lengths = {'inputs': 16, 'targets': 12}
  if kind == 'LM':
    examples, lengths = [{'targets': e['targets']} for e in examples], {'targets': 12}
  converter = getattr(seqio, f'{kind}FeatureConverter')(pack=packing)
  want = list(converter(dataset_of(examples), lengths).as_numpy_iterator())
  if kind == 'PrefixLM':
    lengths = {'targets': 28}
  step = max(lengths.values())  # seqio packs that many examples at a time
  got = [
    ours.convert(converter, columns_of(examples[i : i + step]), lengths, open_bins=1)
    for i in range(0, len(examples), step)
  ]
  assert set(got[0]) == set(want[0])
  for key in want[0]:
    np.testing.assert_array_equal(
      np.concatenate([g[key] for g in got]), np.stack([w[key] for w in want]), err_msg=key
    )


def test_first_fit_loses_no_token_and_overfills_no_bin(seqio):
  from tasks import packing

  draw = np.random.default_rng(2)
  sizes = draw.integers(1, 40, 500)
  values = np.arange(1, sizes.sum() + 1)
  packed = packing.pack({'targets': (values, sizes)}, {'targets': 40})
  tokens, segments = packed['targets'], packed['targets_segment_ids']
  assert sorted(tokens[tokens > 0]) == values.tolist()
  # Every segment of every row is one example, whole and in order.
  starts = set((np.cumsum(sizes) - sizes + 1).tolist())
  for row, ids in zip(tokens, segments, strict=True):
    for s in range(1, ids.max() + 1):
      part = row[ids == s]
      assert part[0] in starts
      assert (np.diff(part) == 1).all()
  assert (tokens > 0).mean() > 0.92
  one = packing.pack({'targets': (values, sizes)}, {'targets': 40}, open_bins=1)
  assert (one['targets'] > 0).mean() < 0.8


def test_cut_is_t5s_split_tokens(seqio):
  import t5.data.preprocessors as t5

  from tasks import packing

  flat, sizes = columns_of([{'t': d} for d in DOCUMENTS])['t']
  _, lengths = packing.cut({'t': (flat, sizes)}, 64)['t']
  parts = np.split(flat, np.cumsum(lengths)[:-1])
  dataset = dataset_of([{'targets': d} for d in DOCUMENTS])
  want = [x['targets'] for x in t5.split_tokens(dataset, max_tokens_per_segment=64)]
  assert len(parts) == len(want)
  for got, expected in zip(parts, want, strict=True):
    np.testing.assert_array_equal(got, expected)


def test_causal_lm_is_every_document_with_one_eos(seqio):
  from research.streams import Stream
  from tasks import objectives

  stream = Stream(lengths={'targets': 64})
  made = objectives.recipe(stream, seqio.ByteVocabulary(125))
  rows = list(objectives.blocks(made, DOCUMENTS, stream.lengths, seed=3))
  tokens = np.concatenate([r['decoder_target_tokens'] for r in rows])
  assert tokens.shape[1] == 64
  assert (tokens == 1).sum() == len(DOCUMENTS)
  everything = np.sort(np.concatenate([*DOCUMENTS, np.ones(len(DOCUMENTS), np.int32)]))
  np.testing.assert_array_equal(np.sort(tokens[tokens > 0]), everything)


def test_span_corruption_is_t5s_token_for_token(seqio):
  import t5.data.preprocessors as t5

  from research.streams import Stream
  from tasks import objectives

  vocabulary = seqio.ByteVocabulary(125)
  stream = Stream(task='span_corruption', lengths={'inputs': 64})
  made = objectives.recipe(stream, vocabulary)
  got = list(objectives.task_dataset(made, DOCUMENTS, seed=7).as_numpy_iterator())

  features = {k: seqio.Feature(vocabulary) for k in ('inputs', 'targets')}
  with seqio.map_seed_manager(7):
    dataset = t5.span_corruption(
      dataset_of([{'targets': d} for d in DOCUMENTS]),
      stream.lengths,
      features,
      merge_examples_to_reduce_padding=False,
    )
    want = list(dataset.as_numpy_iterator())
  assert len(got) == len(want) > 10
  for a, b in zip(got, want, strict=True):
    for key in ('inputs', 'targets'):
      np.testing.assert_array_equal(a[key], [*b[key], 1])


@pytest.mark.parametrize(
  ('inputs', 'density', 'mean'), [(512, 0.15, 3), (64, 0.5, 8), (100, 0.3, 2.5)]
)
def test_span_lengths_are_t5s(seqio, inputs, density, mean):
  import t5.data.preprocessors as t5

  from research.objectives import span_lengths

  want = t5.random_spans_helper(
    inputs_length=inputs,
    noise_density=density,
    mean_noise_span_length=mean,
    extra_tokens_per_span_inputs=1,
    extra_tokens_per_span_targets=1,
  )
  assert span_lengths(inputs, density, mean) == want


def test_a_trained_sentencepiece_model_is_lossless_and_its_bytes_are_true(seqio, tmp_path):
  from research.vocabularies import SentencePiece
  from tasks import vocabularies

  texts = ['def f(x):\n    return  x + 1\n', '\tλ = "naïve"  # 北京 \r\n', '', ' ']
  lines = [f'    value_{i} = compute(alpha, beta[{i}])  # note' for i in range(400)]
  file = tmp_path / 'm.model'
  file.write_bytes(vocabularies.train(SentencePiece(size=420, extra_ids=100), lines + texts[:1]))
  vocabulary = vocabularies.build(SentencePiece(file=str(file), extra_ids=100), tmp_path, None)
  assert vocabulary.vocab_size == 420
  ids = vocabularies.encode(vocabulary, [t.encode() for t in texts])
  assert [vocabulary.decode(i.tolist()) for i in ids] == texts
  sizes = vocabularies.token_bytes(vocabulary)
  assert [int(sizes[i].sum()) for i in ids] == [len(t.encode()) for t in texts]
  assert sizes[:3].tolist() == [0, 0, 0]
  assert not sizes[320:].any()
