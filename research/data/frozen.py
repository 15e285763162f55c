"""Frozen streams and mixtures of them, mapped into memory: examples by index.

`examples_at(seed, positions)` is the order of training: the examples at these positions of the endless,
shuffled stream. It depends on the seed and the positions alone, and every position costs the same to read.
"""

import contextlib
import hashlib
import json
import pathlib

import numpy as np

from research.core import storage
from research.core.errors import Invalid, UserError
from research.data.mixtures import Mixture
from research.data.shards import facts_of
from research.data.spec import digest
from research.data.streams import Stream

Batch = dict[str, np.ndarray]

# In every block of so many positions a mixture draws exactly its share from each stream.
ROUND = 4096


def permuted(indices: np.ndarray, n: int, key: int) -> np.ndarray:
  """The images of `indices` under the random permutation of range(n) that `key` names, without a table.

  A four-round Feistel network on the smallest even number of bits that holds n. A value of n or above
  goes through the network again until it is below n (cycle walking: Black & Rogaway 2002, "Ciphers with
  arbitrary finite domains").
  """
  half = max(1, ((n - 1).bit_length() + 1) // 2)
  mask = np.uint64((1 << half) - 1)
  rounds = np.random.default_rng(key).integers(0, 1 << 63, 4, np.uint64) | np.uint64(1)

  def encrypt(x):
    left, right = x >> np.uint64(half), x & mask
    for round_key in rounds:
      # splitmix64's finaliser as the round function
      z = (right + round_key) * np.uint64(0x9E3779B97F4A7C15)
      z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
    return (left << np.uint64(half)) | right

  out = encrypt(np.asarray(indices).astype(np.uint64))
  while (outside := out >= n).any():
    out[outside] = encrypt(out[outside])
  return out.astype(np.int64)


class Frozen:
  """A frozen stream: rows of fixed shape in memory-mapped shards.

  Attributes:
    manifest: the spec, the corpus and the vocabulary of the stream, and its shards' counts and hashes.
    features: {key: (shape, dtype)} of one example in a batch.
    vocab_size: ids in the vocabulary; every token is below it.
    bytes_per_token: bytes of text per target token (a token with a loss weight).
    fill: the fraction of target positions with a loss weight.
    fingerprint: a hash that changes when any example does.
    passes: how many differently corrupted copies of the corpus are frozen.
  """

  def __init__(self, folder: pathlib.Path, stream: Stream):
    self.folder = folder
    self.stream = stream
    header = json.loads((folder / 'header.json').read_text())
    shards = [facts_of(folder, number, stream.examples) for number in range(stream.passes)]
    if None in shards:
      raise UserError(f'the frozen stream {folder} is incomplete: delete the folder and run again.')
    self.manifest = header | {'shards': shards, 'examples': stream.examples}
    self.vocab_size = header['vocab_size']
    self.passes = stream.passes
    facts = [shard for of_pass in shards for shard in of_pass]
    # An empty piece of text makes an empty shard, which lists no features.
    features = next((shard['features'] for shard in facts if shard['examples']), [])
    if not features:
      counts = [f'{n} {why}' for shard in facts for why, n in shard.get('left_out', {}).items()]
      why = f'left out: {", ".join(counts)}' if counts else 'it has too little text'
      raise UserError(f'{folder} holds no example of the {stream.split} split: {why}.')
    self._dtype = np.dtype([(key, dtype, (length,)) for key, dtype, length in features])
    self.features = {key: ((length,), np.dtype(np.int32)) for key, _, length in features}
    self.bytes_per_token = _ratio(facts, 'target_bytes', 'target_tokens')
    self.fill = _ratio(facts, 'target_tokens', 'positions')
    self._check(facts)
    self._maps = [[self._map(shard) for shard in of_pass] for of_pass in shards]
    self._starts = [np.cumsum([0, *map(len, maps)]) for maps in self._maps]
    # Passes differ a little in length. All count as long as the shortest, so that every epoch is equal.
    self._examples = min(int(starts[-1]) for starts in self._starts)
    if stream.examples is not None:
      self._examples = min(self._examples, stream.examples)
    self.fingerprint = digest([[shard['sha256'] for shard in facts], self._examples])

  def _map(self, facts):
    if not facts['examples']:
      return np.empty(0, self._dtype)
    return np.memmap(self.folder / facts['file'], self._dtype, 'r')

  def _check(self, facts):
    """Checks the size of every shard, and its hash if the file has changed since the last check."""
    stamp = self.folder / 'verified.json'
    verified = json.loads(stamp.read_text()) if stamp.exists() else {}
    newly_verified = {}
    for shard in facts:
      path = self.folder / shard['file']
      remedy = f'delete {self.folder} and run again.'
      if not path.exists():
        raise UserError(f'shard {path} is missing: {remedy}')
      stat = path.stat()
      size = shard['examples'] * self._dtype.itemsize
      if stat.st_size != size:
        raise UserError(
          f'shard {path} is damaged: it has {stat.st_size} bytes, not {size}: {remedy}'
        )
      state = [stat.st_size, stat.st_mtime_ns, shard['sha256']]
      if verified.get(shard['file']) != state:
        with open(path, 'rb') as f:
          if hashlib.file_digest(f, 'sha256').hexdigest() != shard['sha256']:
            raise UserError(f'shard {path} was altered since it was written: {remedy}')
        newly_verified[shard['file']] = state
    if newly_verified:
      # A cache without write permission can be read too; it is only checked again next time.
      with contextlib.suppress(OSError):
        storage.write_atomic(stamp, json.dumps(verified | newly_verified))

  def per_example(self, key: str) -> float:
    """Mean of a shard fact, such as 'target_tokens', over the examples."""
    facts = [shard for of_pass in self.manifest['shards'] for shard in of_pass]
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
      inside = shard == s
      rows[inside] = self._maps[number][s][indices[inside] - starts[s]]
    return {key: rows[key].astype(np.int32) for key in self._dtype.names}

  def examples_at(self, seed: int, positions: np.ndarray) -> Batch:
    """The examples at `positions` of the endless stream, which every epoch shuffles anew."""
    n = len(self)
    epochs = positions // n
    offsets = positions % n
    out = {
      key: np.empty((len(positions), *shape), dtype)
      for key, (shape, dtype) in self.features.items()
    }
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      permutation = int(digest([seed, int(epoch)]), 16)
      # Epochs take the passes in turn: each epoch has the next corruption of the text.
      rows = self.examples(permuted(offsets[inside], n, permutation), int(epoch) % self.passes)
      for key, value in rows.items():
        out[key][inside] = value
    return out

  def epochs(self, examples: int) -> dict[str, float]:
    """{name: epochs} after training on so many examples."""
    return {self.stream.name: examples / len(self)}


def _ratio(facts: list[dict], numerator: str, denominator: str) -> float:
  return sum(f[numerator] for f in facts) / max(1, sum(f[denominator] for f in facts))


class FrozenMixture:
  """Several frozen streams mixed into one, with the interface of `Frozen`.

  Attributes:
    parts: {name: Frozen}; evaluate each for its own loss.
    rates: {name: share of the examples}, a multiple of 1/ROUND.
  """

  def __init__(self, mixture: Mixture, parts: dict[str, Frozen]):
    self.stream = mixture
    self.parts = parts
    first = next(iter(parts))
    self.features = {k: v for part in parts.values() for k, v in part.features.items()}
    for name, part in parts.items():
      # Where only some streams have prefixes, the rows of the others get a prefix of length 0.
      missing = self.features.keys() - part.features.keys() - {'decoder_causal_attention'}
      if missing or not part.features.items() <= self.features.items():
        why = f'the features or lengths of {name!r} differ from those of {first!r}.'
        raise Invalid(Mixture, 'streams', why)
      if part.manifest['vocabulary'] != parts[first].manifest['vocabulary']:
        why = f'{name!r} and {first!r} have different vocabularies: train one and name its file in both.'
        raise Invalid(Mixture, 'streams', why)
    shares = mixture.shares({name: len(part) for name, part in parts.items()})
    self._quotas = apportion(np.array([shares[name] for name in parts]), ROUND)
    if not self._quotas.all():
      name = list(parts)[int(np.argmin(self._quotas))]
      raise Invalid(Mixture, 'rates', f'{name!r} has a share of under 1/{ROUND}: leave it out.')
    self._ends = np.cumsum(self._quotas)
    self.rates = {name: q / ROUND for name, q in zip(parts, self._quotas.tolist(), strict=True)}
    self.vocab_size = parts[first].vocab_size
    tokens = self._per_example('target_tokens')
    self.bytes_per_token = self._per_example('target_bytes') / tokens
    self.fill = tokens / self._per_example('positions')
    self.fingerprint = digest([self.rates, [p.fingerprint for p in parts.values()]])
    self.manifest = {'rates': self.rates, 'streams': {n: p.manifest for n, p in parts.items()}}

  def _per_example(self, key: str) -> float:
    """Mean of a shard fact over the examples of the mixture."""
    return sum(rate * self.parts[name].per_example(key) for name, rate in self.rates.items())

  def __len__(self) -> int:
    """Examples of all parts."""
    return sum(map(len, self.parts.values()))

  def examples(self, indices) -> Batch:
    """Examples of the parts, one part after the other."""
    ends = np.cumsum([len(p) for p in self.parts.values()])
    indices = np.asarray(indices)
    part_numbers = np.searchsorted(ends, indices, side='right')

    def read(number, inside, part):
      return part.examples(indices[inside] - (ends[number] - len(part)))

    return self._gather(part_numbers, read)

  def examples_at(self, seed: int, positions: np.ndarray) -> Batch:
    """The examples at `positions` of the mixed stream: each ROUND positions hold each part's exact share."""
    rounds = positions // ROUND
    within = positions % ROUND
    # A round is a permutation of slots, and each part has as many neighbouring slots as its quota.
    slots = np.empty_like(positions)
    for r in np.unique(rounds):
      inside = rounds == r
      slots[inside] = permuted(within[inside], ROUND, int(digest([seed, 'round', int(r)]), 16))
    part_numbers = np.searchsorted(self._ends, slots, side='right')
    starts = (self._ends - self._quotas)[part_numbers]
    # How many examples its part gave before it: the part's position in its own endless stream.
    drawn = rounds * self._quotas[part_numbers] + slots - starts

    def read(number, inside, part):
      return part.examples_at(seed + number, drawn[inside])

    return self._gather(part_numbers, read)

  def _gather(self, part_numbers, read) -> Batch:
    """A batch whose row i comes from part `part_numbers[i]`; `read` gives a part's rows."""
    rows = len(part_numbers)
    # Zeros: a feature that a part lacks stays 0 in its rows.
    out = {key: np.zeros((rows, *shape), dtype) for key, (shape, dtype) in self.features.items()}
    for number, part in enumerate(self.parts.values()):
      inside = part_numbers == number
      if inside.any():
        for key, value in read(number, inside, part).items():
          out[key][inside] = value
    return out

  def epochs(self, examples: int) -> dict[str, float]:
    """{name of a part: its epochs} after training on so many examples."""
    return {n: examples * r / len(self.parts[n]) for n, r in self.rates.items()}


def apportion(shares: np.ndarray, total: int) -> np.ndarray:
  """Whole numbers that sum to `total`, nearest to the shares (largest remainders)."""
  exact = shares / shares.sum() * total
  whole = np.floor(exact).astype(np.int64)
  for i in np.argsort(whole - exact, kind='stable')[: total - whole.sum()]:
    whole[i] += 1
  return whole
