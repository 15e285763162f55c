"""Reads prompts from a file of JSON lines, and writes answers to another file, also after an interruption."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

from research.core.errors import UserError
from research.inference.generator import Generator
from research.inference.request import Completion

# Chooses one of the completions of a prompt; returns it, and the scores of all.
Choice = Callable[[str, list[Completion]], tuple[Completion, list[float | None]]]


def read_prompts(path: pathlib.Path) -> list[str]:
  """Reads the prompts of a file. Every line is a JSON string, or an object with the key 'prompt'.

  Raises:
    UserError: there is no such file, it has no prompts, or a line is neither of the two.
  """
  if not path.is_file():
    raise UserError(f'--prompts={path}: there is no such file.')
  prompts = []
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise UserError(f'{path}:{number}: not JSON ({error}).') from error
    prompt = value.get('prompt') if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
      raise UserError(
        f'{path}:{number}: write a string, or an object with a "prompt", on every line.'
      )
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'{path} has no prompts.')
  return prompts


def as_row(number: int, prompt: str, identity: str, completions: list[Completion]) -> dict:
  """Returns one line of the answers, as JSON values."""
  return {
    'number': number,
    'prompt': prompt,
    'identity': identity,
    'texts': [c.text for c in completions],
    'tokens': [c.tokens for c in completions],
    'logprobs': [c.logprobs for c in completions],
    'top': [c.top for c in completions],
    'finish': [c.finish for c in completions],
    'errors': [c.error for c in completions if c.error],
  }


def identity_of(settings: dict) -> str:
  """Returns a digest of everything that an answer depends on beside its prompt."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def answered(path: pathlib.Path, prompts: list[str], identity: str) -> set[int]:
  """Returns the numbers of the prompts that a file already answers. Removes a last line that was cut off.

  Raises:
    UserError: the file answers other prompts, or was written with other settings.
  """
  if not path.is_file():
    return set()
  done = set()
  whole = []
  for line in path.read_text().splitlines(keepends=True):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if row is None or not line.endswith('\n'):
      break  # the process was killed while it wrote this line
    number = row.get('number') if isinstance(row, dict) else None
    if number not in range(len(prompts)) or row.get('prompt') != prompts[number]:
      raise UserError(f'{path} answers other prompts; choose another --out, or delete it.')
    if row.get('identity') != identity:
      raise UserError(
        f'{path} was written with other settings or another checkpoint; choose another --out, or delete it.'
      )
    done.add(number)
    whole.append(line)
  path.write_text(''.join(whole))
  return done


def answer_all(
  generator: Generator,
  prompts: list[str],
  out: pathlib.Path,
  identity: str,
  *,
  samples: int,
  choose: Choice | None = None,
  **settings,
) -> Iterator[dict]:
  """Answers every prompt that `out` lacks. Writes and yields a row as soon as all samples of a prompt are done.

  Args:
    generator: the model and its tokenizer.
    prompts: all prompts, those that are answered already too.
    out: the file of answers.
    identity: `identity_of` the settings.
    samples: answers per prompt.
    choose: chooses one of the samples of each prompt; None writes them all.
    **settings: of `Request`.

  Raises:
    UserError: `out` has other answers, or a prompt does not fit the model.
  """
  done = answered(out, prompts, identity)
  engine = generator.engine
  waiting = {}  # completions by prompt, until all samples are done
  owner = {}  # the prompt of every request
  for number, prompt in enumerate(prompts):
    if number not in done:
      # All requests are checked before the first is answered.
      for request in generator.requests(prompt, samples, **settings):
        owner[engine.submit(request)] = number
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open('a') as file:
    while engine.busy:
      for event in engine.step():
        if not event.completion.finish:
          continue
        number = owner[event.number]
        waiting.setdefault(number, {})[event.number] = event.completion
        if len(waiting[number]) == samples:
          completions = [completion for _, completion in sorted(waiting.pop(number).items())]
          scores = {}
          if choose is not None:
            completion, scores['scores'] = choose(prompts[number], completions)
            completions = [completion]
          row = as_row(number, prompts[number], identity, completions) | scores
          file.write(json.dumps(row) + '\n')
          file.flush()
          yield row
