"""Frozen streams and mixtures of them, as memory: examples by index.

`at(seed, positions)` is the order of training: which examples the endless, shuffled stream has at its
positions. It is a function of the seed and the positions alone, and costs the same everywhere.
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from research.core.errors import Invalid, UserError
from research.data.mixtures import Mixture
from research.data.shards import facts_of
from research.data.spec import digest
from research.data.streams import Stream

Batch = dict[str, np.ndarray]

# Positions after which a mixture has drawn from every stream exactly its share.
ROUND = 4096


def permuted(indices: np.ndarray, n: int, key: int) -> np.ndarray:
  """Where a random permutation of range(n), named by `key`, sends `indices`; no table is kept.

  A four-round Feistel network on the smallest even number of bits that holds n, walked until it comes
  back below n (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
  """
  half = max(1, ((n - 1).bit_length() + 1) // 2)
  mask = np.uint64((1 << half) - 1)
  rounds = np.random.default_rng(key).integers(0, 1 << 63, 4, np.uint64) | np.uint64(1)

  def once(x):
    left, right = x >> np.uint64(half), x & mask
    for r in rounds:
      # splitmix64's finaliser as the round function
      z = (right + r) * np.uint64(0x9E3779B97F4A7C15)
      z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << np.uint64(half)) | right

  out = once(np.asarray(indices).astype(np.uint64))
  while (outside := out >= n).any():
    out[outside] = once(out[outside])
  return out.astype(np.int64)


class Frozen:
  """A frozen stream: rows of fixed shape in memory-mapped shards.

  Attributes:
    manifest: what the stream is (spec, corpus, vocabulary), and its shards' counts and hashes.
    features: {key: (shape, dtype)} of one example as batches give it.
    vocab_size: ids in the vocabulary; every token is below it.
    bytes_per_token: true bytes of text per target token (a token with loss weight).
    fingerprint: differs when any example does.
    passes: how many corruptions of the corpus are frozen.
  """

  def __init__(self, folder: pathlib.Path, stream: Stream):
    self.folder, self.stream = folder, stream
    header = json.loads((folder / 'header.json').read_text())
    shards = [facts_of(folder, p, stream.examples) for p in range(stream.passes)]
    if None in shards:
      raise UserError(f'{folder} is not complete: delete it and run again.')
    self.manifest = header | {'shards': shards, 'examples': stream.examples}
    self.vocab_size, self.passes = header['vocab_size'], stream.passes
    facts = [s for some in shards for s in some]
    rows = next((f['features'] for f in facts if f['examples']), [])
    if not rows:
      raise UserError(f'{folder} holds no example: the {stream.split} split is too small.')
    self._dtype = np.dtype([(k, d, (n,)) for k, d, n in rows])
    self.features = {k: ((n,), np.dtype(np.int32)) for k, _, n in rows}
    self.bytes_per_token = _ratio(facts, 'target_bytes', 'target_tokens')
    self.fill = _ratio(facts, 'target_tokens', 'positions')
    self._check(facts)
    self._maps = [[self._map(s) for s in some] for some in shards]
    self._starts = [np.cumsum([0, *map(len, maps)]) for maps in self._maps]
    # Every pass has as many examples as the shortest: an epoch is the same length each time.
    self._examples = min(int(starts[-1]) for starts in self._starts)
    if stream.examples is not None:
      self._examples = min(self._examples, stream.examples)
    self.fingerprint = digest([[f['sha256'] for f in facts], self._examples])

  def _map(self, facts):
    if not facts['examples']:
      return np.empty(0, self._dtype)
    return np.memmap(self.folder / facts['file'], self._dtype, 'r')

  def _check(self, facts):
    """Sizes always, hashes once for every state of the files."""
    stamp = self.folder / 'verified.json'
    known = json.loads(stamp.read_text()) if stamp.exists() else {}
    fresh = {}
    for shard in facts:
      path = self.folder / shard['file']
      remedy = f'delete {self.folder} and run again.'
      if not path.exists():
        raise UserError(f'shard {path} has vanished: {remedy}')
      stat = path.stat()
      if stat.st_size != shard['examples'] * self._dtype.itemsize:
        raise UserError(f'shard {path} has {stat.st_size} bytes, not what was written: {remedy}')
      state = [stat.st_size, stat.st_mtime_ns, shard['sha256']]
      if known.get(shard['file']) != state:
        with open(path, 'rb') as f:
          if hashlib.file_digest(f, 'sha256').hexdigest() != shard['sha256']:
            raise UserError(f'shard {path} was altered since it was written: {remedy}')
        fresh[shard['file']] = state
    if fresh:
      partial = stamp.with_name(f'{stamp.name}.{os.getpid()}')
      try:
        partial.write_text(json.dumps(known | fresh))
        os.replace(partial, stamp)
      except OSError:
        pass  # a cache that only others may write is read all the same

  def per_example(self, key: str) -> float:
    """Mean of a shard fact, such as 'target_tokens', over the examples."""
    facts = [s for some in self.manifest['shards'] for s in some]
    return _ratio(facts, key, 'examples')

  def __len__(self) -> int:
    """Examples per epoch."""
    return self._examples

  def examples(self, indices, number: int = 0) -> Batch:
    """Examples of pass `number`, stacked in the order of `indices`: {key: (n, length) int32}."""
    indices = np.asarray(indices)
    starts = self._starts[number]
    shard = np.searchsorted(starts, indices, side='right') - 1
    rows = np.empty(len(indices), self._dtype)
    for s in np.unique(shard):
      here = shard == s
      rows[here] = self._maps[number][s][indices[here] - starts[s]]
    return {k: rows[k].astype(np.int32) for k in self._dtype.names}

  def at(self, seed: int, positions: np.ndarray) -> Batch:
    """What the endless stream, shuffled anew every epoch, has at `positions`."""
    n = len(self)
    epochs, offsets = positions // n, positions % n
    out = {
      k: np.empty((len(positions), *shape), dtype) for k, (shape, dtype) in self.features.items()
    }
    for epoch in np.unique(epochs):
      here = epochs == epoch
      key = int(digest([seed, int(epoch)]), 16)
      rows = self.examples(permuted(offsets[here], n, key), int(epoch) % self.passes)
      for k, value in rows.items():
        out[k][here] = value
    return out

  def epochs(self, examples: int) -> dict[str, float]:
    """How often each source has been gone through after so many examples of training."""
    return {self.stream.name: examples / len(self)}


def _ratio(facts, above, below):
  return sum(f[above] for f in facts) / max(1, sum(f[below] for f in facts))


class FrozenMixture:
  """Several frozen streams as one; has what `Frozen` has.

  Attributes:
    parts: {name: Frozen}; evaluate each for its own loss.
    rates: {name: share of the examples}, a multiple of 1/ROUND.
  """

  def __init__(self, mixture: Mixture, parts: dict[str, Frozen]):
    self.stream, self.parts = mixture, parts
    first, *_ = parts
    self.features = {k: v for part in parts.values() for k, v in part.features.items()}
    for name, part in parts.items():
      # Where some have prefixes, the rows of the others have none.
      missing = self.features.keys() - part.features.keys() - {'decoder_causal_attention'}
      if missing or not part.features.items() <= self.features.items():
        why = f'{name!r} has other features or lengths than {first!r}.'
        raise Invalid(Mixture, 'streams', why)
      if part.manifest['vocabulary'] != parts[first].manifest['vocabulary']:
        why = f'{name!r} has another vocabulary than {first!r}: train one and name its file.'
        raise Invalid(Mixture, 'streams', why)
    shares = mixture.shares({name: len(part) for name, part in parts.items()})
    self._quotas = apportion(np.array([shares[name] for name in parts]), ROUND)
    if not self._quotas.all():
      name = list(parts)[int(np.argmin(self._quotas))]
      raise Invalid(Mixture, 'rates', f'{name!r} has a share of under 1/{ROUND}: leave it out.')
    self._ends = np.cumsum(self._quotas)
    self.rates = {name: q / ROUND for name, q in zip(parts, self._quotas.tolist(), strict=True)}
    self.vocab_size = parts[first].vocab_size
    per = lambda key: sum(r * parts[n].per_example(key) for n, r in self.rates.items())
    self.bytes_per_token = per('target_bytes') / per('target_tokens')
    self.fill = per('target_tokens') / per('positions')
    self.fingerprint = digest([self.rates, [p.fingerprint for p in parts.values()]])
    self.manifest = {'rates': self.rates, 'streams': {n: p.manifest for n, p in parts.items()}}

  def __len__(self) -> int:
    """Examples of all parts."""
    return sum(map(len, self.parts.values()))

  def examples(self, indices) -> Batch:
    """Examples of the parts, one part after the other."""
    ends = np.cumsum([len(p) for p in self.parts.values()])
    indices = np.asarray(indices)
    which = np.searchsorted(ends, indices, side='right')
    return self._gather(which, lambda d, here, part: part.examples(
      indices[here] - (ends[d] - len(part))
    ))  # fmt: skip

  def at(self, seed: int, positions: np.ndarray) -> Batch:
    """What the mixed stream has at `positions`: in every ROUND of them each part's exact share."""
    rounds, within = positions // ROUND, positions % ROUND
    slots = np.empty_like(positions)
    for r in np.unique(rounds):
      here = rounds == r
      slots[here] = permuted(within[here], ROUND, int(digest([seed, 'round', int(r)]), 16))
    which = np.searchsorted(self._ends, slots, side='right')
    drawn = rounds * self._quotas[which] + slots - (self._ends - self._quotas)[which]
    return self._gather(which, lambda d, here, part: part.at(seed + d, drawn[here]))

  def _gather(self, which, rows_of) -> Batch:
    out = {k: np.zeros((len(which), *shape), dtype) for k, (shape, dtype) in self.features.items()}
    for d, part in enumerate(self.parts.values()):
      here = which == d
      if here.any():
        for k, value in rows_of(d, here, part).items():
          out[k][here] = value
    return out

  def epochs(self, examples: int) -> dict[str, float]:
    """How often each part has been gone through after so many examples of training."""
    return {n: examples * r / len(self.parts[n]) for n, r in self.rates.items()}


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
  """Whole numbers that sum to `total`, nearest to the shares (largest remainders)."""
  exact = shares / shares.sum() * total
  whole = np.floor(exact).astype(np.int64)
  for i in np.argsort(whole - exact, kind='stable')[: total - whole.sum()]:
    whole[i] += 1
  return whole
