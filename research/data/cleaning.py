"""Rules that clean a corpus before it is tokenised: dataclasses, which `tasks.cleaning` applies."""

import dataclasses

from research.core.errors import Invalid


@dataclasses.dataclass(frozen=True)
class Filter:
  """Base of the rules that look at one document at a time, and keep, change or drop it.

  To add one, write a subclass with a method `apply(text) -> (text, why)`: the new text, and the reason to drop
  the document ('' keeps it).
  """


@dataclasses.dataclass(frozen=True)
class Length(Filter):
  """Keeps documents of `low` to `high` characters."""

  low: int = 1
  high: int = 1_000_000

  def __post_init__(self):
    if not 0 <= self.low <= self.high:
      raise Invalid(Length, 'low', f'{self.low} must be from 0 to high, {self.high}.')


@dataclasses.dataclass(frozen=True)
class C4(Filter):
  """C4's rules that need no word list (Raffel et al. 2020, arXiv:1910.10683, section 2.2).

  Drops lines without final punctuation, with fewer than `line_words` words, or with 'javascript'. Then drops
  pages with 'lorem ipsum', with a curly bracket, or with fewer than `sentences` sentences.
  """

  line_words: int = 5
  sentences: int = 3


@dataclasses.dataclass(frozen=True)
class Gopher(Filter):
  """MassiveText's quality and repetition rules (Rae et al. 2021, arXiv:2112.11446, table A1, A.1.1).

  Attributes:
    repetition: whether to apply the repetition rules too.
  """

  low_words: int = 50
  high_words: int = 100_000
  repetition: bool = True


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
  """Keeps one of every set of near-duplicate documents: MinHash with banding (Broder 1997).

  Two documents whose shingles have Jaccard similarity J become candidates with probability
  1 - (1 - J^rows)^bands, and are duplicates when `threshold` of their hashes agree.

  Attributes:
    threshold: the least similarity of a duplicate.
    permutations: hashes per document; the estimate's standard error is sqrt(J(1-J)/permutations).
    shingle: words per shingle.
  """

  threshold: float = 0.8
  permutations: int = 128
  shingle: int = 5

  def __post_init__(self):
    if not 0 < self.threshold <= 1:
      raise Invalid(NearDuplicates, 'threshold', f'{self.threshold} must be above 0, at most 1.')
    if self.permutations < 16 or self.permutations % 16:
      why = f'{self.permutations} must be a multiple of 16.'
      raise Invalid(NearDuplicates, 'permutations', why)

  @property
  def rows(self) -> int:
    """Hashes per band: the most for which a pair at the threshold is a candidate with probability .95."""
    fits = [1]
    for rows in (r for r in range(2, self.permutations + 1) if self.permutations % r == 0):
      if self.candidate(self.threshold, rows) >= 0.95:
        fits.append(rows)
    return max(fits)

  def candidate(self, similarity: float, rows: int | None = None) -> float:
    """The probability that a pair of this similarity shares a band."""
    rows = rows or self.rows
    return 1 - (1 - similarity**rows) ** (self.permutations // rows)


@dataclasses.dataclass(frozen=True)
class Contamination:
  """Finds training documents that repeat validation text: shared n-grams (Brown et al. 2020, appendix C).

  Attributes:
    ngram: words in a row that must be equal.
    drop: whether to drop such training documents; otherwise they are only counted.
  """

  ngram: int = 13
  drop: bool = False

  def __post_init__(self):
    if self.ngram < 1:
      raise Invalid(Contamination, 'ngram', f'{self.ngram} must be positive.')
