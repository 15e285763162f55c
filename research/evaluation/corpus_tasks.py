"""Tasks on the validation text of a corpus, the embedded one by default: perplexity and line cloze."""

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
  """At most `most` validation documents of a corpus, in the order of its store.

  Freezing writes the store, in another process; its text is read here.

  Raises:
    UserError: the corpus cannot be read, or has no validation text.
  """
  # Freezing any stream of the corpus writes its store. This one is the smallest.
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
  """The perplexity of validation documents.

  Attributes:
    corpus: the corpus of the documents.
    longest: the most characters of a document, from its start.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  longest: int = 4096
  examples: int = 32

  @property
  def name(self) -> str:
    return f'perplexity-{self.corpus.name}'

  def items(self) -> list[Item]:
    texts = [text[: self.longest] for text in documents(self.corpus, self.examples)]
    # The target is the size in bytes, which no tokenizer changes.
    return [Item((RollingLogLikelihood(text),), len(text.encode())) for text in texts]

  def measure(self, item, answers):
    (answer,) = answers
    return {'nats': -answer.nats, 'tokens': answer.tokens, 'bytes': item.target}

  def summarise(self, measures):
    """Means over all tokens and over all bytes, so that long documents count more."""
    nats = sum(measure['nats'] for measure in measures)
    tokens = sum(measure['tokens'] for measure in measures)
    size = sum(measure['bytes'] for measure in measures)
    if not tokens:
      return {}
    return {
      'nats_per_token': nats / tokens,
      'perplexity': math.exp(min(nats / tokens, 700.0)),  # exp of more overflows
      'bits_per_byte': nats / math.log(2) / size,
      'tokens': tokens,
      'bytes': size,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineCloze(Task):
  """Multiple choice of the next line. The wrong choices are other lines of the same document.

  Attributes:
    corpus: the corpus of the documents.
    choices: the number of choices, the right one included.
    context: the most characters before the line, cut at a line's start.
    shortest: the fewest characters of a choice, without the spaces around it.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  choices: int = 4
  context: int = 400
  shortest: int = 12

  @property
  def name(self) -> str:
    return f'line-cloze-{self.corpus.name}-{self.choices}choices'

  def items(self) -> list[Item]:
    rng = random.Random(self.seed)
    items = []
    # More documents than items, because some have too few lines.
    for text in documents(self.corpus, 4 * self.examples):
      if item := self.item(text, rng):
        items.append(item)
      if len(items) == self.examples:
        return items
    if not items:
      raise UserError(
        f'no document of {self.corpus.name} has {self.choices} different lines of {self.shortest} '
        'characters; lower LineCloze.choices or LineCloze.shortest.'
      )
    return items

  def item(self, text: str, rng: random.Random) -> Item | None:
    """An item of one document; None where it has too few lines."""
    lines = text.splitlines(keepends=True)
    # The first line has no context.
    numbers = [i for i, line in enumerate(lines) if i and len(line.strip()) >= self.shortest]
    different = {lines[i].strip() for i in numbers}
    if len(different) < self.choices:
      return None
    number = rng.choice(numbers)
    context = ''.join(lines[:number])[-self.context :]
    if len(context) == self.context:
      # The cut may have gone through a line: the rest of that line is left out.
      context = context.partition('\n')[2] or context
    line = lines[number]
    right = line.strip()
    indent = line[: len(line) - len(line.lstrip())]
    choices = [right, *rng.sample(sorted(different - {right}), self.choices - 1)]
    rng.shuffle(choices)
    # All choices have the indentation of the right one, so that it gives nothing away.
    requests = tuple(LogLikelihood(context + indent, choice + '\n') for choice in choices)
    return Item(requests, (tuple(choices), choices.index(right)))

  def measure(self, item, answers):
    choices, right = item.target
    return judge_choices(answers, choices, right)
