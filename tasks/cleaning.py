"""Cleaning rules and duplicates, for `research.data.cleaning`. A rule returns the text to keep, or why not."""

import collections
import hashlib
import re
import zlib

import numpy as np

from research.core.errors import UserError
from research.data import cleaning

_END = ('.', '!', '?', '"', '”')
_STOP = {'the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'}
_BULLETS = ('•', '*', '-', '–', '●', '‣')


def clean(text: str, filters, dropped: collections.Counter) -> str | None:
  """`text` after every filter; None, counted in `dropped`, where one of them refuses it."""
  for rule in filters:
    text, why = _apply(rule, text)
    if why:
      dropped[f'{type(rule).__name__}: {why}'] += 1
      return None
  return text


def _apply(rule, text: str) -> tuple[str, str]:
  """A rule's own method, or ours for its class."""
  if hasattr(rule, 'apply'):
    return rule.apply(text)
  for kind in type(rule).__mro__:
    if kind in _RULES:
      return _RULES[kind](rule, text)
  raise UserError(f'{type(rule).__name__} needs a method apply(text): see docs/data.md.')


def _length(rule, text):
  if len(text) < rule.low:
    return text, f'under {rule.low} characters'
  return text, f'over {rule.high} characters' if len(text) > rule.high else ''


def _c4(rule, text):
  lower = text.lower()
  if 'lorem ipsum' in lower:
    return text, 'lorem ipsum'
  if '{' in text:
    return text, 'curly bracket'
  lines = [line.strip() for line in text.splitlines()]
  kept = [
    line
    for line in lines
    if line.endswith(_END)
    and not line.endswith('...')
    and len(line.split()) >= rule.line_words
    and 'javascript' not in line.lower()
  ]
  text = '\n'.join(kept)
  sentences = len(re.findall(r'[.!?]["”]?(?=\s|$)', text))
  return text, f'under {rule.sentences} sentences' if sentences < rule.sentences else ''


def _gopher(rule, text):
  words = text.split()
  if not rule.low_words <= len(words) <= rule.high_words:
    return text, f'not {rule.low_words} to {rule.high_words} words'
  if not 3 <= sum(map(len, words)) / len(words) <= 10:
    return text, 'mean word length not 3 to 10'
  symbols = text.count('#') + text.count('...') + text.count('…')
  if symbols / len(words) > 0.1:
    return text, 'over 0.1 symbols per word'
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
    return text, 'over 90% bullets'
  if sum(line.endswith(('...', '…')) for line in lines) > 0.3 * len(lines):
    return text, 'over 30% lines end in an ellipsis'
  if sum(any(c.isalpha() for c in w) for w in words) < 0.8 * len(words):
    return text, 'under 80% words with a letter'
  if len(_STOP & {w.lower() for w in words}) < 2:
    return text, 'under 2 stop words'
  return text, _repetition(text, lines, words) if rule.repetition else ''


def _repetition(text, lines, words) -> str:
  for name, parts in (('lines', lines), ('paragraphs', text.split('\n\n'))):
    counts = collections.Counter(p for p in parts if p.strip())
    repeated = [(p, n - 1) for p, n in counts.items() if n > 1]
    if sum(n for _, n in repeated) > 0.3 * max(1, counts.total()):
      return f'over 30% duplicate {name}'
    if sum(len(p) * n for p, n in repeated) > 0.2 * len(text):
      return f'over 20% of characters in duplicate {name}'
  for n, most in ((2, 0.2), (3, 0.18), (4, 0.16)):
    grams = collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))
    gram, count = max(grams.items(), key=lambda item: item[1] * sum(map(len, item[0])))
    if count > 1 and count * sum(map(len, gram)) > most * len(text):
      return f'over {most:.0%} of characters in one {n}-gram'
  for n, most in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True):
    grams = collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))
    inside = np.zeros(len(words), bool)
    for i, gram in enumerate(zip(*(words[j:] for j in range(n)), strict=False)):
      if grams[gram] > 1:
        inside[i : i + n] = True
    share = sum(len(w) for w, hit in zip(words, inside, strict=True) if hit)
    if share > most * len(text):
      return f'over {most:.0%} of characters in repeated {n}-grams'
  return ''


_RULES = {cleaning.Length: _length, cleaning.C4: _c4, cleaning.Gopher: _gopher}


def ngrams(text: bytes, n: int) -> np.ndarray:
  """Sorted 64-bit hashes of the distinct n-grams of words; one of the whole where there are fewer."""
  words = re.findall(rb'\w+', text.lower())
  codes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
  n = max(1, min(n, len(codes)))
  with np.errstate(over='ignore'):
    total = np.zeros(max(0, len(codes) - n + 1), np.uint64)
    codes = mixed(codes)
    for i in range(n):
      total = total * np.uint64(0x100000001B3) + codes[i : i + len(total)]
  return np.unique(mixed(total))


def mixed(x: np.ndarray) -> np.ndarray:
  """splitmix64's finaliser: every input bit reaches every output bit."""
  with np.errstate(over='ignore'):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


class MinHash:
  """Remembers documents, and tells which of the next ones nearly repeat them."""

  def __init__(self, rule: cleaning.NearDuplicates):
    self.rule, self.rows = rule, rule.rows
    draw = np.random.default_rng(0x5EED)
    self.salts = draw.integers(1, 1 << 63, rule.permutations, np.uint64)
    self.signatures: list[np.ndarray] = []
    self.bands = [collections.defaultdict(list) for _ in range(rule.permutations // self.rows)]

  def signature(self, text: bytes) -> np.ndarray:
    """(permutations,) uint32: the least hash of the shingles under each permutation."""
    shingles = ngrams(text, self.rule.shingle)
    least = np.full(len(self.salts), np.iinfo(np.uint64).max)
    for i in range(0, len(shingles), 4096):
      hashes = mixed(shingles[i : i + 4096, None] ^ self.salts)
      least = np.minimum(least, hashes.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)

  def band_hashes(self, signature: np.ndarray) -> list[int]:
    """A 64-bit hash of each band. Documents that share a band have equal hashes there; rarely others do."""
    parts = [part.tobytes() for part in signature.reshape(-1, self.rows)]
    return [int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), 'big') for part in parts]

  def seen(self, text: bytes) -> bool:
    """Whether a remembered document is a near-duplicate of `text`; if none is, `text` is remembered."""
    return self.has_seen(self.signature(text))

  def has_seen(self, signature: np.ndarray) -> bool:
    """`seen` of the document with this signature."""
    keys = [part.tobytes() for part in signature.reshape(-1, self.rows)]
    candidates = {i for band, key in zip(self.bands, keys, strict=True) for i in band.get(key, ())}
    for i in candidates:
      if (self.signatures[i] == signature).mean() >= self.rule.threshold:
        return True
    for band, key in zip(self.bands, keys, strict=True):
      band[key].append(len(self.signatures))
    self.signatures.append(signature)
    return False


def _places(values: np.ndarray, known: np.ndarray) -> np.ndarray:
  """Where in the sorted `known` those of the values are that it has.

  np.isin would go through all of `known` for each document, and it grows with the text.
  """
  places = np.searchsorted(known, values)
  inside = places < len(known)
  return places[inside][known[places[inside]] == values[inside]]


class Overlap:
  """N-grams of the validation documents, and how many of them training repeats."""

  def __init__(self, rule: cleaning.Contamination):
    self.rule, self.parts = rule, []
    self.known = self.hit = None

  def add(self, text: bytes):
    """One validation document; those of under n words are too short to tell."""
    if len(re.findall(rb'\w+', text)) >= self.rule.ngram:
      self.parts.append(ngrams(text, self.rule.ngram))

  def close(self) -> None:
    """Ends the validation split: its distinct n-grams are known, and none of them is repeated yet."""
    self.known = np.unique(np.concatenate([*self.parts, np.zeros(0, np.uint64)]))
    self.hit = np.zeros(len(self.known), bool)

  def in_training(self, text: bytes) -> bool:
    """Whether a training document shares an n-gram with validation."""
    if self.known is None:
      self.close()
    found = _places(ngrams(text, self.rule.ngram), self.known)
    self.hit[found] = True
    return len(found) > 0

  def report(self) -> dict:
    """Validation documents with a repeated n-gram, and the share of n-grams that are repeated."""
    if self.known is None:
      return {'documents': 0, 'ngrams': 0.0, 'of_documents': len(self.parts)}
    repeated = self.known[self.hit]
    touched = sum(len(_places(part, repeated)) > 0 for part in self.parts)
    share = float(self.hit.mean()) if len(self.hit) else 0.0
    return {'documents': int(touched), 'ngrams': share, 'of_documents': len(self.parts)}
