"""Prompts from a file of JSON lines, and answers to one, which goes on where it was interrupted."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

from research.core.errors import UserError
from research.inference.generator import Generator
from research.inference.request import Completion

# (the completion to keep, the scores of all), of a prompt and its completions.
Choice = Callable[[str, list[Completion]], tuple[Completion, list[float | None]]]


def read_prompts(path: pathlib.Path) -> list[str]:
  """The prompts of a file: a JSON string, or an object with 'prompt', on each line.

  Raises:
    UserError: a line has neither.
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
      raise UserError(f'{path}:{number}: a string, or an object with a "prompt", is wanted here.')
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'{path} has no prompts.')
  return prompts


def as_row(number: int, prompt: str, identity: str, completions: list[Completion]) -> dict:
  """One line of the answers."""
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
  """A digest of everything that an answer depends on besides its prompt."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def answered(path: pathlib.Path, prompts: list[str], identity: str) -> set[int]:
  """The numbers of the prompts that a file answers; a line that was cut off is removed from it.

  Raises:
    UserError: the file answers other prompts, or was written with other settings.
  """
  if not path.is_file():
    return set()
  done, whole = set(), []
  for line in path.read_text().splitlines(keepends=True):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if row is None or not line.endswith('\n'):
      break  # the process ended while it wrote this
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
  """Answers every prompt that `out` lacks; writes, and yields, each as soon as all its samples are done.

  Args:
    choose: keeps one of the samples of each prompt.
  """
  done = answered(out, prompts, identity)
  engine, waiting, owner = generator.engine, {}, {}
  for number, prompt in enumerate(prompts):
    if number not in done:
      # All are checked before the first is answered.
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
