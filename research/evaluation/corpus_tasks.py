"""Tasks on the validation text of a corpus, the embedded one by default: perplexity, and cloze of a line."""

import dataclasses
import json
import math
import random

import numpy as np

from research.core.errors import UserError
from research.data import cache
from research.data.corpora import Corpus, PythonSources
from research.data.spec import digest, to_spec
from research.data.streams import FORMAT, Stream
from research.evaluation.requests import LogLikelihood, RollingLogLikelihood
from research.evaluation.task import Item, Task, judge_choices


def documents(corpus: Corpus, most: int) -> list[str]:
  """At most so many validation documents of a corpus, in the order of its store.

  The store is made by freezing, in a process of its own; here its text is read as it lies.

  Raises:
    UserError: the corpus cannot be read, or has no validation text.
  """
  # The smallest stream of the corpus: to freeze it makes the store.
  cache.open_stream(Stream(corpus=corpus, split='validation', examples=1, lengths={'targets': 64}))
  key = digest([FORMAT, to_spec(corpus), corpus.signature()])
  folder = cache.default_cache() / 'corpora' / f'{corpus.name}-{key}'
  if not (folder / 'manifest.json').is_file():
    raise UserError(
      f'the text of {corpus.name} is not in the data cache {folder.parent}; freeze it.'
    )
  pieces = json.loads((folder / 'manifest.json').read_text())['splits']['validation']['pieces']
  texts: list[str] = []
  for piece in range(pieces):
    text = (folder / f'validation-{piece:05d}.txt').read_bytes()
    start = 0
    for end in np.load(folder / f'validation-{piece:05d}.npy').tolist():
      if len(texts) == most:
        return texts
      texts.append(text[start:end].decode())
      start = end
  return texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
  """The log-likelihood of validation documents.

  Attributes:
    corpus: whose validation documents.
    longest: so many characters of a document at most, from its start.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  longest: int = 4096
  examples: int = 32

  @property
  def name(self) -> str:
    return f'perplexity-{self.corpus.name}'

  def items(self) -> list[Item]:
    texts = [text[: self.longest] for text in documents(self.corpus, self.examples)]
    return [Item((RollingLogLikelihood(text),), len(text.encode())) for text in texts]

  def measure(self, item, answers):
    (answer,) = answers
    return {'nats': -answer.nats, 'tokens': answer.tokens, 'bytes': item.target}

  def summarise(self, measures):
    """Means over tokens and over bytes: long documents weigh more."""
    nats, tokens, size = (sum(m[key] for m in measures) for key in ('nats', 'tokens', 'bytes'))
    if not tokens:
      return {}
    return {
      'nats_per_token': nats / tokens,
      'perplexity': math.exp(min(nats / tokens, 700.0)),
      'bits_per_byte': nats / math.log(2) / size,
      'tokens': tokens,
      'bytes': size,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineCloze(Task):
  """Which line comes next? The right one, among other lines of the same document.

  Attributes:
    corpus: whose validation documents.
    choices: lines to choose from, the right one among them.
    context: so many characters before the line at most, cut at a line's start.
    shortest: a line has so many characters or more, without the spaces around it.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  choices: int = 4
  context: int = 400
  shortest: int = 12

  @property
  def name(self) -> str:
    return f'line-cloze-{self.corpus.name}-{self.choices}choices'

  def items(self) -> list[Item]:
    chance, items = random.Random(self.seed), []
    for text in documents(self.corpus, 4 * self.examples):
      if item := self.item(text, chance):
        items.append(item)
      if len(items) == self.examples:
        return items
    if not items:
      raise UserError(
        f'no document of {self.corpus.name} has {self.choices} different lines of {self.shortest} '
        'characters; lower LineCloze.choices or LineCloze.shortest.'
      )
    return items

  def item(self, text: str, chance: random.Random) -> Item | None:
    """An item of one document; None where it has too few lines."""
    lines = text.splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if i and len(line.strip()) >= self.shortest]
    others = {lines[i].strip() for i in places}
    if len(others) < self.choices:
      return None
    place = chance.choice(places)
    context = ''.join(lines[:place])[-self.context :]
    # A cut that went through a line leaves the rest of it out.
    context = context if len(context) < self.context else context.partition('\n')[2] or context
    right = lines[place].strip()
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    wrong = chance.sample(sorted(others - {right}), self.choices - 1)
    choices = [right, *wrong]
    chance.shuffle(choices)
    # All choices are indented as the right one: the indentation tells nothing.
    requests = tuple(LogLikelihood(context + indent, choice + '\n') for choice in choices)
    return Item(requests, (tuple(choices), choices.index(right)))

  def measure(self, item, answers):
    choices, right = item.target
    return judge_choices(answers, choices, right)
