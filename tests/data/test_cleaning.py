"""Duplicates, contamination and filters, against what theory or the papers' rules say."""

import collections

import numpy as np
import pytest

from research.core.errors import Invalid
from research.data.cleaning import C4, Contamination, Gopher, Length, NearDuplicates
from tasks import cleaning

WORDS = np.array([f'w{i}' for i in range(50_000)])


def pair(draw, similarity, n=400):
  """Two texts of words whose shingles of one word have this Jaccard similarity, and its exact value."""
  shared = round(n * similarity)
  words = draw.permutation(WORDS)[: 2 * n - shared]
  a, b = words[:n], np.concatenate([words[:shared], words[n:]])
  return ' '.join(a).encode(), ' '.join(b).encode(), shared / (2 * n - shared)


def test_the_share_of_equal_hashes_is_the_jaccard_similarity():
  draw = np.random.default_rng(0)
  made = cleaning.MinHash(NearDuplicates(permutations=256, shingle=1))
  for similarity in (0.2, 0.5, 0.8, 0.95):
    a, b, jaccard = pair(draw, similarity)
    got = (made.signature(a) == made.signature(b)).mean()
    assert abs(got - jaccard) < 4 * (jaccard * (1 - jaccard) / 256) ** 0.5


@pytest.mark.parametrize('similarity', [0.6, 0.8, 0.85, 0.9, 0.97])
def test_planted_near_duplicates_are_found_as_often_as_minhash_theory_says(similarity):
  rule = NearDuplicates(threshold=0.7, permutations=128, shingle=1)
  draw, n = np.random.default_rng(1), 150
  found, sizes = 0, []
  made = cleaning.MinHash(rule)
  for _ in range(n):
    a, b, jaccard = pair(draw, similarity)
    sizes.append(jaccard)
    assert not made.seen(a), 'an unrelated document was taken for a duplicate'
    found += made.seen(b)
  # A duplicate is a candidate pair whose 128 hashes agree in at least 70%: theory by simulation.
  hashes = draw.random((4000, rule.permutations)) < np.mean(sizes)
  candidate = hashes.reshape(4000, -1, rule.rows).all(-1).any(-1)
  p = (candidate & (hashes.mean(1) >= rule.threshold)).mean()
  assert abs(found - n * p) <= 4 * (n * p * (1 - p)) ** 0.5 + 1
  close = rule.candidate(np.mean(sizes))
  assert abs(candidate.mean() - close) < 4 * (close * (1 - close) / 4000) ** 0.5 + 1e-3


def test_rows_keep_recall_at_the_threshold():
  for threshold in (0.5, 0.7, 0.8, 0.9):
    rule = NearDuplicates(threshold=threshold)
    assert rule.permutations % rule.rows == 0
    assert rule.candidate(threshold) >= 0.95
  assert NearDuplicates(threshold=0.9).rows > NearDuplicates(threshold=0.5).rows
  with pytest.raises(Invalid, match='multiple of 16'):
    NearDuplicates(permutations=100)


def test_a_store_drops_planted_duplicates_and_reports_contamination(tmp_path):
  import json

  from research.data.corpora import JsonLines
  from tasks import store

  draw = np.random.default_rng(2)
  documents = [' '.join(draw.choice(WORDS, 300)) for _ in range(100)]
  near = [d.replace(d.split()[7], 'changed') for d in documents[:20]]
  exact = documents[20:50]
  file = tmp_path / 'train.jsonl'
  file.write_text(''.join(json.dumps({'text': t}) + '\n' for t in documents + near + exact))
  held_out = [' '.join(draw.choice(WORDS, 100)) for _ in range(10)]
  held_out[3] = held_out[3] + ' ' + ' '.join(documents[70].split()[100:120])
  held_out[4] = documents[71]
  other = tmp_path / 'validation.jsonl'
  other.write_text(''.join(json.dumps({'text': t}) + '\n' for t in held_out))
  files = {'files': str(file), 'validation_files': str(other)}
  corpus = JsonLines(**files, near_duplicates=NearDuplicates(), contamination=Contamination())
  lines = []
  made = store.open_store(corpus, tmp_path / 'cache', lines.append)
  assert made.manifest['dropped'] == {
    'exact duplicates': 30,
    'exact duplicates of validation': 1,
    'near duplicates': 20,
  }
  assert made.manifest['splits']['train']['documents'] == 99
  # The exact copy left training, so one repeated passage is what is left.
  assert made.manifest['contamination']['documents'] == 1
  assert made.manifest['contamination']['of_documents'] == 10
  assert any('1 of 10 validation documents share 13 words' in line for line in lines)
  dropping = JsonLines(**files, contamination=Contamination(drop=True))
  made = store.open_store(dropping, tmp_path / 'cache', lines.append)
  assert made.manifest['dropped']['share an n-gram with validation'] == 1


def kept(text, *filters):
  dropped = collections.Counter()
  return cleaning.clean(text, filters, dropped), list(dropped)


PROSE = 'It was the best of times and it was the worst of times to have been with them. '


def test_c4_keeps_sentences_and_drops_pages_of_code():
  page = (
    'Menu\n'
    + (PROSE + '\n') * 3
    + 'Please enable javascript to see this page, thank you.\nshort one.\n'
  )
  text, why = kept(page, C4())
  assert why == []
  assert text == '\n'.join([PROSE.strip()] * 3)
  assert kept('int f() { return 0; }', C4())[1] == ['C4: curly bracket']
  assert kept('Lorem ipsum dolor sit amet, so they say here.', C4())[1] == ['C4: lorem ipsum']
  assert kept('Only one sentence stands on this page here.', C4())[1] == ['C4: under 3 sentences']


def test_gopher_says_which_rule():
  draw = np.random.default_rng(3)
  good = ' '.join([*draw.choice(WORDS, 200), 'the', 'and', 'of'])
  cases = {
    'not 50 to 100000 words': 'the and of',
    'mean word length not 3 to 10': 'a b the ' * 40,
    'over 0.1 symbols per word': good.replace(' ', ' #', 60),
    'over 90% bullets': '\n'.join('- ' + ' '.join(draw.choice(WORDS, 8)) for _ in range(30)),
    'over 30% lines end in an ellipsis': '\n'.join(
      ' '.join(draw.choice(WORDS, 20)) + '...' for _ in range(9)
    ),
    'under 80% words with a letter': good + ' 12345' * 200,
    'under 2 stop words': ' '.join(draw.choice(WORDS, 200)),
    'over 30% duplicate lines': (good + '\n') * 3,
    'over 20% of characters in one 2-gram': good + ' same words' * 60,
  }
  assert kept(good, Gopher()) == (good, [])
  for why, text in cases.items():
    assert kept(text, Gopher())[1] == [f'Gopher: {why}'], why


def test_length_counts_characters():
  assert kept('naïve', Length(5, 5)) == ('naïve', [])
  assert kept('naive!', Length(1, 5))[1] == ['Length: over 5 characters']
  assert kept('', Length(1, 5))[1] == ['Length: under 1 characters']
