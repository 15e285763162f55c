"""Reads prompts from a file of JSON lines, and writes answers to another file, also after an interruption."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator

from research.core import storage
from research.core.errors import UserError
from research.inference.flags import SETTINGS
from research.inference.generator import EMPTY, Generator
from research.inference.request import Completion

# Chooses one of the completions of a prompt; returns it, and the scores of all.
Choice = Callable[[str, list[Completion]], tuple[Completion, list[float | None]]]
ROW_START = '{"number": '  # how every line of the answers begins
ANOTHER_OUT = 'choose another --out, or delete the file.'


def read_prompts(path: pathlib.Path) -> list[str]:
  """Reads the prompts of a file. Every line is a JSON string, or an object with the key 'prompt'.

  Other keys of an object, such as an id, are ignored, unless they are names of flags.

  Raises:
    UserError: there is no such file, it has no prompts, or a line is neither of the two or has no text.
  """
  prompts = []
  for number, line in enumerate(_lines(path, '--prompts'), 1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise UserError(f'{path}:{number}: not JSON ({error}).') from error
    prompt = value.get('prompt') if isinstance(value, dict) else value
    if prompt == '':
      raise UserError(f'{path}:{number}: {EMPTY}')
    if not isinstance(prompt, str):
      raise UserError(
        f'{path}:{number}: write a string, or an object with a "prompt", on every line.'
      )
    settings = SETTINGS & set(value) if isinstance(value, dict) else set()
    if settings:
      name = min(settings)
      raise UserError(
        f'{path}:{number}: "{name}" is a setting of all prompts; give it as --{name}, and leave it out here.'
      )
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'{path} has no prompts.')
  return prompts


def _lines(path: pathlib.Path, flag: str) -> list[str]:
  """Returns the lines of a text file, without their ends.

  Raises:
    UserError: it cannot be read, or is not UTF-8.
  """
  try:
    text = path.read_bytes().decode('utf-8-sig')
  except OSError as error:
    raise UserError(f'{flag}={path}: {error.strerror or error}; name a file.') from None
  except UnicodeDecodeError as error:
    raise UserError(f'{flag}={path}: the file is not UTF-8 (byte {error.start}).') from None
  # `str.splitlines` would also split at characters that JSON allows within a string, such as U+2028.
  return text.split('\n')


def _appending(path: pathlib.Path):
  """Opens a file to append to it.

  Raises:
    UserError: the file cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open('a', encoding='utf-8')
  except OSError as error:
    raise UserError(
      f'--out={path}: {error.strerror or error}; name a file that can be written.'
    ) from None


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
  }


def identity_of(settings: dict) -> str:
  """Returns a digest of everything that an answer depends on beside its prompt."""
  return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def answered(path: pathlib.Path, prompts: list[str], identity: str) -> set[int]:
  """Returns the numbers of the prompts that a file already answers. Removes a last line that was cut off.

  Raises:
    UserError: the file has something else than answers, answers other prompts, or was written with other
      settings.
  """
  if not path.exists():
    return set()
  *lines, rest = _lines(path, '--out')
  done = set()
  for number, line in enumerate(lines, 1):
    done.add(_number_of(line, f'{path}:{number}', prompts, identity))
  if rest:
    # The process was killed while it wrote this line. Another file's last line is not removed.
    if not rest.startswith(ROW_START[: len(rest)]):
      raise UserError(f'{path}:{len(lines) + 1}: this is no answer; {ANOTHER_OUT}')
    storage.write_atomic(path, ''.join(f'{line}\n' for line in lines))
  return done


def _number_of(line: str, place: str, prompts: list[str], identity: str) -> int:
  """Returns the number of the prompt that a line answers.

  Raises:
    UserError: it is no answer, answers another prompt, or was written with other settings.
  """
  try:
    row = json.loads(line)
  except ValueError:
    row = None
  if not isinstance(row, dict) or not {'number', 'prompt', 'identity'} <= set(row):
    raise UserError(f'{place}: this is no answer; {ANOTHER_OUT}')
  number = row['number']
  if number not in range(len(prompts)) or row['prompt'] != prompts[number]:
    raise UserError(f'{place} answers another prompt; {ANOTHER_OUT}')
  if row['identity'] != identity:
    raise UserError(f'{place} was written with other settings or another checkpoint; {ANOTHER_OUT}')
  return number


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

  A prompt of which a sample ends with an error gets no row, so that the next start tries it again.

  Args:
    generator: the model and its tokenizer.
    prompts: all prompts, those that are answered already too.
    out: the file of answers.
    identity: `identity_of` the settings.
    samples: answers per prompt.
    choose: chooses one of the samples of each prompt; None writes them all.
    **settings: of `Request`.

  Raises:
    UserError: `out` has other answers, or a prompt does not fit the model. After all others have been answered:
      a sample ended with an error.
  """
  done = answered(out, prompts, identity)
  engine = generator.engine
  waiting = {}  # completions by prompt, until all samples are done
  owner = {}  # the prompt of every request
  errors = {}  # by prompt
  for number, prompt in enumerate(prompts):
    if number not in done:
      # All requests are checked before the first is answered.
      try:
        for request in generator.requests(prompt, samples, **settings):
          owner[engine.submit(request)] = number
      except UserError as error:
        raise UserError(f'prompt number {number} (from 0): {error}') from error
  with _appending(out) as file:
    while engine.busy:
      for event in engine.step():
        if not event.completion.finish:
          continue
        number = owner[event.number]
        waiting.setdefault(number, {})[event.number] = event.completion
        if len(waiting[number]) == samples:
          completions = [completion for _, completion in sorted(waiting.pop(number).items())]
          error = next((c.error for c in completions if c.error), None)
          if error:
            errors[number] = error
            continue
          scores = {}
          if choose is not None:
            completion, scores['scores'] = choose(prompts[number], completions)
            completions = [completion]
          row = as_row(number, prompts[number], identity, completions) | scores
          file.write(json.dumps(row) + '\n')
          file.flush()
          yield row
  if errors:
    number, error = min(errors.items())
    raise UserError(
      f'{len(errors)} of {len(prompts)} prompts have no answer; number {number} (from 0): {error}'
    )
