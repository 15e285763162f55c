"""Tasks against seqio and t5 themselves: the wiring may be fast, the tokens must be theirs."""

import numpy as np
import pytest

from research.data import objectives

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


def made_of(seqio, **fields):
  """(stream, recipe) of an objective over a byte vocabulary with room for UL2's sentinels."""
  from research.data.streams import Stream
  from research.data.vocabularies import Bytes
  from tasks import objectives as built

  stream = Stream(vocabulary=Bytes(extra_ids=200), **fields)
  return stream, built.recipe(stream, seqio.ByteVocabulary(200))


def rows_of(stream, made, documents, seed=3):
  from tasks import recipes

  rows = list(recipes.blocks(made, documents, stream.lengths, seed))
  return {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def as_documents(arrays):
  return [{'targets': a} for a in arrays]


# One denoiser of each mode: every further one costs seconds of tracing.
UL2 = objectives.UL2(
  (
    objectives.Denoiser('R', 3, 0.15),
    objectives.Denoiser('S', 0, 0.25),
    objectives.Denoiser('X', 8, 0.5),
  )
)
OBJECTIVES = [
  {'task': 'causal_lm', 'lengths': {'targets': 64}},
  {'task': 'fim', 'lengths': {'targets': 64}},
  {'task': 'masked_lm', 'lengths': {'targets': 64}},
  {'task': 'masked_lm', 'architecture': 'encoder', 'lengths': {'inputs': 64}},
  *(
    {'task': task, 'architecture': architecture, 'lengths': lengths}
    for task in ('prefix_lm', 'span_corruption', UL2)
    for architecture, lengths in (
      ('decoder', {'targets': 96}),
      ('encoder_decoder', {'inputs': 64, 'targets': 64}),
    )
  ),
]
named = lambda f: f'{f["task"] if f["task"] is not UL2 else "ul2"}-{f.get("architecture", "")}'


@pytest.mark.parametrize('fields', OBJECTIVES, ids=named)
def test_no_token_sees_another_document(seqio, fields):
  """Document d is written in its own ten bytes; every segment of a packed row holds one alphabet."""
  documents = [
    np.resize(np.arange(3 + 10 * d, 13 + 10 * d), 7 + 9 * d).astype(np.int32) for d in range(25)
  ]
  stream, made = made_of(seqio, **fields)
  rows = rows_of(stream, made, as_documents(documents))
  packed = 0
  sides = [s for s in ('encoder', 'decoder') if f'{s}_segment_ids' in rows]
  for i in range(len(rows[f'{sides[0]}_segment_ids'])):
    last = max(rows[f'{s}_segment_ids'][i].max() for s in sides)
    packed += last > 1
    for segment in range(1, last + 1):
      alphabets = set()
      for side in sides:
        here = rows[f'{side}_segment_ids'][i] == segment
        for key in (f'{side}_input_tokens', f'{side}_target_tokens'):
          # A tenth of the tokens that a masked LM chose is random.
          if key in rows and not (fields['task'] == 'masked_lm' and 'input' in key):
            alphabets |= {(t - 3) // 10 for t in rows[key][i][here].tolist() if 3 <= t < 259}
        positions = rows[f'{side}_positions'][i][here]
        assert positions.tolist() == list(range(len(positions)))
      assert len(alphabets) == 1
  assert packed > 0
  # Every document's text is there: nothing was dropped on the way.
  everything = np.concatenate([rows[k].ravel() for k in rows if k.endswith('_tokens')])
  assert {(t - 3) // 10 for t in everything.tolist() if 3 <= t < 259} >= set(range(25))


@pytest.mark.parametrize('task', ['causal_lm', 'span_corruption'])
def test_an_objective_is_a_function_of_its_seed(seqio, task):
  lengths = {'targets': 64} if task == 'causal_lm' else {'inputs': 64}
  stream, made = made_of(seqio, task=task, lengths=lengths)
  first, again, other = (rows_of(stream, made, as_documents(DOCUMENTS), s) for s in (3, 3, 4))
  for key in first:
    np.testing.assert_array_equal(first[key], again[key], err_msg=key)
  assert any((first[k].shape != other[k].shape) or (first[k] != other[k]).any() for k in first)


def test_causal_lm_is_every_document_with_one_eos(seqio):
  stream, made = made_of(seqio, task='causal_lm', lengths={'targets': 64})
  tokens = rows_of(stream, made, as_documents(DOCUMENTS))['decoder_target_tokens']
  assert tokens.shape[1] == 64
  assert (tokens == 1).sum() == len(DOCUMENTS)
  everything = np.sort(np.concatenate([*DOCUMENTS, np.ones(len(DOCUMENTS), np.int32)]))
  np.testing.assert_array_equal(np.sort(tokens[tokens > 0]), everything)


@pytest.mark.parametrize(
  'task', ['prefix_lm', pytest.param('span_corruption', marks=pytest.mark.slow)]
)
def test_t5s_own_objectives_token_for_token(seqio, task):
  import t5.data.preprocessors as t5

  from tasks import recipes

  lengths = {'inputs': 64, 'targets': 64}
  _, made = made_of(seqio, task=task, architecture='encoder_decoder', lengths=lengths)
  dataset = recipes.task_dataset(made, made.parts[0], as_documents(DOCUMENTS), seed=7)
  got = list(dataset.as_numpy_iterator())

  features = {k: seqio.Feature(seqio.ByteVocabulary(200)) for k in ('inputs', 'targets')}
  whole = {'merge_examples_to_reduce_padding': False} if task == 'span_corruption' else {}
  with seqio.map_seed_manager(7):
    dataset = getattr(t5, task)(dataset_of(as_documents(DOCUMENTS)), lengths, features, **whole)
    want = list(dataset.as_numpy_iterator())
  assert len(got) == len(want) > 10
  for a, b in zip(got, want, strict=True):
    for key in ('inputs', 'targets'):
      np.testing.assert_array_equal(a[key], [*b[key], 1])


@pytest.mark.parametrize('task', ['span_corruption', UL2], ids=['span_corruption', 'ul2'])
def test_corrupted_inputs_and_targets_give_the_text_back(seqio, task):
  """Each sentinel of the inputs stands for what follows it in the targets."""
  lengths = {'inputs': 64, 'targets': 64}
  stream, made = made_of(seqio, task=task, lengths=lengths, packing=False)
  document = np.arange(3, 203, dtype=np.int32)  # no byte twice: the order can be read off
  rows = rows_of(stream, made, as_documents([document]))
  restored = []
  for inputs, targets in zip(
    rows['encoder_input_tokens'].tolist(), rows['decoder_target_tokens'].tolist(), strict=True
  ):
    spans, sentinel = {}, None
    for t in targets[: targets.index(1)]:
      if t > 261:
        sentinel = t
      else:
        spans.setdefault(sentinel, []).append(t)
    inputs = [t for t in inputs[: inputs.index(1)] if not 259 <= t <= 261]
    text = [u for t in inputs for u in (spans.pop(t, []) if t > 261 else [t])]
    restored.append(text + [u for rest in spans.values() for u in rest])
  assert sorted(t for r in restored for t in r) == document.tolist()
  assert all((np.diff(r) == 1).all() for r in restored)


@pytest.mark.slow
def test_ul2_shares_the_text_equally_and_says_the_mode(seqio):
  lengths = {'inputs': 128, 'targets': 128}
  stream, made = made_of(seqio, task='ul2', lengths=lengths, packing=False)
  documents = as_documents([rng.integers(3, 259, 400, dtype=np.int32) for _ in range(70)])
  rows = rows_of(stream, made, documents)
  modes = rows['encoder_input_tokens'][:, 0] - 259
  assert set(modes.tolist()) == {0, 1, 2}
  real = lambda key: ((rows[key] >= 3) & (rows[key] < 259)).sum(1)
  text = real('encoder_input_tokens') + real('decoder_target_tokens')
  share = np.bincount(modes, weights=text) / text.sum()
  np.testing.assert_allclose(share, [2 / 7, 1 / 7, 4 / 7], atol=1e-6)
  predicted = real('decoder_target_tokens')[modes == 1].sum() / text[modes == 1].sum()
  assert 0.2 < predicted < 0.3


def test_masked_lm_masks_as_bert_does(seqio):
  stream, made = made_of(seqio, task='masked_lm', lengths={'targets': 128})
  documents = as_documents([rng.integers(3, 259, 500, dtype=np.int32) for _ in range(80)])
  rows = rows_of(stream, made, documents)
  inputs, targets = rows['decoder_input_tokens'], rows['decoder_target_tokens']
  chosen = rows['decoder_loss_weights'] > 0
  n = (targets >= 3).sum()
  # Within four standard deviations of the binomial.
  near = lambda k, n, p: abs(k - n * p) < 4 * (n * p * (1 - p)) ** 0.5
  assert near(chosen.sum(), n, 0.15)
  assert near((inputs[chosen] == 259).sum(), chosen.sum(), 0.8)
  assert near((inputs[chosen] == targets[chosen]).sum(), chosen.sum(), 0.1 + 0.1 / 256)
  np.testing.assert_array_equal(inputs[~chosen], targets[~chosen])


def test_whole_words_are_masked_together(seqio):
  task = objectives.MaskedLM(whole_word=True, noise_density=0.3)
  stream, made = made_of(seqio, task=task, lengths={'targets': 4096})
  text = 'alpha beta, gamma  delta_9 (x1) naive café '.encode() * 40
  rows = rows_of(stream, made, as_documents([np.frombuffer(text, np.uint8).astype(np.int32) + 3]))
  ids, weights = rows['decoder_target_tokens'][0], rows['decoder_loss_weights'][0]
  words, fates = 0, set()
  word_of = np.cumsum([not (b >= 128 or chr(b).isalnum()) for b in text])
  for w in np.unique(word_of):
    inside = [i for i in np.flatnonzero(word_of == w) if text[i] >= 128 or chr(text[i]).isalnum()]
    if len(inside) > 1:
      words += 1
      assert len(set(weights[inside].tolist())) == 1, bytes(text[i] for i in inside)
      fates.add(int(weights[inside[0]]))
  assert ids[: len(text)].tolist() == [b + 3 for b in text]
  assert words >= 240
  assert fates == {0, 1}


def test_fill_in_the_middle_only_moves_text(seqio):
  task = objectives.FillInTheMiddle(rate=1.0)
  stream, made = made_of(seqio, task=task, lengths={'targets': 68}, packing=False)
  document = np.resize(np.arange(3, 203), 64 * 50).astype(np.int32)
  rows = rows_of(stream, made, as_documents([document]))['decoder_target_tokens'].tolist()
  spm, segments = 0, set()
  for row in rows:
    row = row[: row.index(1)]
    pre, suf, mid = (row.index(m) for m in (259, 260, 261))
    assert pre == 0
    spm += suf == 1
    # In SPM order the prefix comes with the middle; PSM with an empty prefix reads the same.
    text = row[pre + 1 : suf] + row[mid + 1 :] + row[suf + 1 : mid]
    assert len(text) == 64 or len(row) < 67
    assert ((np.diff(text) - 1) % 200 == 0).all()
    segments |= {text[0]} if text else set()
  assert 12 <= spm <= 40
  assert len(segments) > 1


def test_instructions_put_the_loss_on_the_completion_and_drop_what_does_not_fit(seqio):
  from research.data.corpora import JsonLines
  from tasks import vocabularies

  corpus = JsonLines(files=__file__, field='completion', prompt='prompt')
  stream, made = made_of(seqio, task='instructions', corpus=corpus, lengths={'targets': 24})
  texts = [b'1+1=\x002', b'what?\x00yes', b'x' * 30 + b'\x00no']
  documents = vocabularies.encode(seqio.ByteVocabulary(200), texts, pairs=True)
  rows = rows_of(stream, made, documents)
  weighted = rows['decoder_target_tokens'][rows['decoder_loss_weights'] > 0]
  assert sorted((weighted[weighted > 1] - 3).tolist()) == sorted(b'2yes')
  assert (weighted == 1).sum() == 2
  assert 'decoder_causal_attention' not in rows


@pytest.mark.parametrize(
  ('inputs', 'density', 'mean'), [(512, 0.15, 3), (64, 0.5, 8), (100, 0.3, 2.5)]
)
def test_span_lengths_are_t5s(seqio, inputs, density, mean):
  import t5.data.preprocessors as t5

  from research.data.objectives import span_lengths

  want = t5.random_spans_helper(
    inputs_length=inputs,
    noise_density=density,
    mean_noise_span_length=mean,
    extra_tokens_per_span_inputs=1,
    extra_tokens_per_span_targets=1,
  )
  assert span_lengths(inputs, density, mean) == want


def test_a_trained_sentencepiece_model_is_lossless_and_its_bytes_are_true(seqio, tmp_path):
  from research.data.vocabularies import SentencePiece
  from tasks import vocabularies

  texts = ['def f(x):\n    return  x + 1\n', '\tλ = "naïve"  # 北京 \r\n', '', ' ']
  lines = [f'    value_{i} = compute(alpha, beta[{i}])  # note' for i in range(400)]
  file = tmp_path / 'm.model'
  file.write_bytes(vocabularies.train(SentencePiece(size=420, extra_ids=100), lines + texts[:1]))
  vocabulary = vocabularies.build(SentencePiece(file=str(file), extra_ids=100), tmp_path, None)
  assert vocabulary.vocab_size == 420
  ids = vocabularies.encode(vocabulary, [t.encode() for t in texts])
  ids = [i['targets'] for i in ids]
  assert [vocabulary.decode(i.tolist()) for i in ids] == texts
  sizes = vocabularies.token_bytes(vocabulary)
  assert [int(sizes[i].sum()) for i in ids] == [len(t.encode()) for t in texts]
  assert sizes[:3].tolist() == [0, 0, 0]
  assert not sizes[320:].any()


@pytest.fixture(scope='module')
def tokenizer_files(tmp_path_factory):
  """A byte-level BPE whose id 0 is text, and one with padding at 0, both trained here."""
  tokenizers = pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('tokenizers')
  lines = ['def f(x):\n    return  x + 1\n', 'naïve 北京 café'] * 50
  for name, special in (('gpt2', ['<|endoftext|>']), ('padded', ['<pad>', '</s>'])):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      initial_alphabet=alphabet,
      special_tokens=special if name == 'padded' else [],
      show_progress=False,
    )
    made.train_from_iterator(lines, trainer)
    made.add_special_tokens(special)
    made.save(str(folder / f'{name}.json'))
  return folder


@pytest.mark.parametrize(('name', 'offset'), [('gpt2', 1), ('padded', 0)])
def test_a_tokenizer_json_keeps_zero_for_padding_and_counts_true_bytes(
  seqio, tokenizer_files, name, offset
):
  import tensorflow as tf

  from research.data.vocabularies import HuggingFaceTokenizer
  from tasks import vocabularies

  wanted = HuggingFaceTokenizer(file=str(tokenizer_files / f'{name}.json'), extra_ids=20)
  vocabulary = vocabularies.build(wanted, None, None)
  assert vocabulary.offset == offset
  texts = ['def g(y):\n\treturn "北京"  # ünïcode', '!', '']
  ids = [d['targets'] for d in vocabularies.encode(vocabulary, [t.encode() for t in texts])]
  assert all((i > 0).all() for i in ids)
  assert [vocabulary.decode(i.tolist()) for i in ids] == texts
  assert vocabulary.encode_tf(tf.constant(texts[0])).numpy().tolist() == ids[0].tolist()
  sizes = vocabularies.token_bytes(vocabulary)
  assert [int(sizes[i].sum()) for i in ids] == [len(t.encode()) for t in texts]
  assert sizes[vocabulary.eos_id] == 0
  assert vocabulary.eos_id not in np.concatenate(ids)
  assert not sizes[-20:].any()


def test_a_tokenizer_without_the_named_eos_says_what_it_has(seqio, tokenizer_files):
  from research.core.errors import Invalid
  from tasks.tokenizers import TokenizerVocabulary

  with pytest.raises(Invalid, match=r"'</ss>' is not in .*Did you mean </s>"):
    TokenizerVocabulary(str(tokenizer_files / 'padded.json'), eos='</ss>')
