"""Generates text with a checkpoint.

    python -m research.generate --checkpoint=runs/tiny --prompt='def f(x):' --temperature=0.8
    python -m research.generate --hf=FOLDER --prompts=prompts.jsonl --out=answers.jsonl --samples=4

The checkpoint is a run's workdir or a converted model's folder; --hf reads a Hugging Face folder as it is.
--prompt=- reads the prompt from standard input. With --prompts the answers are JSON lines; started again, the
command answers only what is missing. --beams searches for the likeliest answer; --draft and --ngram speculate.
--best_of=16 --reward=FILE.gin keeps the best of 16 answers.
"""

import dataclasses
import pathlib
import sys

from research.core import cli

if __name__ == '__main__':
  from research.inference.flags import parse

  FLAGS = parse(__doc__)
  cli.use_huge_pages()

from flax import nnx

from research.core.describe import describe
from research.data.encoding import make_encoding
from research.evaluation import loading
from research.inference import answers, beams, one_by_one, speculate, terminal, tokenizer
from research.inference.flags import SAMPLING
from research.inference.generator import Generator, make_generator
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from research.reinforcement import best_of

PENALTIES = {'length': beams.by_length, 'wu': beams.wu}


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A model that was read: with shapes in place of arrays, its parameters, the run that trained it if any."""

  model: nnx.Module
  params: dict
  run: object | None
  tokenizer_folder: pathlib.Path
  source: str


def load(
  checkpoint: str | None = None,
  *,
  hf: str | None = None,
  tokenizer_file: str | None = None,
  room: int = 0,
  slots: int = 8,
  int8: bool = False,
  beam_count: int = 0,
  penalty: str = 'length',
  draft: str | None = None,
  ngram: int = 0,
  guesses: int = 4,
) -> Generator:
  """A model that generates, from a run's or a converted model's folder or from a Hugging Face folder.

  Call it, and use the generator, under a mesh: `with Mesh().use(jax.devices()[:1]): ...`. The arguments are
  the flags of the command; `beam_count` is --beams.

  Raises:
    UserError: there is no such model, it sees both ways, or the tokenizer is not its own.
  """
  opened = _open(checkpoint, hf)
  graphdef = nnx.graphdef(opened.model)
  architecture = loading.architecture_of(opened.run, opened.model)
  search = speculation = None
  if beam_count:
    search = one_by_one.Beams(graphdef, opened.params, beam_count, PENALTIES[penalty])
  elif ngram:
    guess = speculate.Ngram(ngram)
    speculation = one_by_one.Speculation(graphdef, opened.params, guess, guesses=guesses)
  elif draft:
    is_hf = (pathlib.Path(draft) / 'config.json').is_file()
    guesser = _open(None, draft) if is_hf else _open(draft, None)
    speculation = one_by_one.Speculation(
      graphdef, opened.params, nnx.graphdef(guesser.model), guesser.params, guesses
    )
  text = _tokenizer_of(opened, tokenizer_file, architecture)
  return make_generator(
    opened.model, opened.params, text, architecture, room=room or loading.length_of(opened.run),
    slots=slots, int8=int8, beams=search, speculation=speculation, source=opened.source,
  )  # fmt: skip


def _open(checkpoint: str | None, hf: str | None) -> _Opened:
  """Reads one of the two kinds of folders."""
  folder = loading.open_hf(hf) if hf else loading.open_folder(checkpoint)
  model = loading.abstract_model(folder.model)
  source = hf or f'{checkpoint} at step {folder.step}'
  return _Opened(model, loading.read_params(folder), folder.run, folder.tokenizer, source)


def _tokenizer_of(opened: _Opened, file: str | None, architecture: str) -> tokenizer.Tokenizer:
  """The tokenizer of a file, of the run's data, or beside the weights."""
  if file:
    return tokenizer.of_file(pathlib.Path(file))
  if opened.run:
    encoding = make_encoding(loading.vocabulary_of(opened.run))
    return tokenizer.of_encoding(encoding, architecture == 'encoder_decoder')
  return tokenizer.of_folder(opened.tokenizer_folder)


def main(flags) -> None:
  """Answers as the flags say, on the first device."""
  import logging

  import jax

  from research.training.program import keep_compiled

  sampling = Sampling(**{name: getattr(flags, name) for name in SAMPLING})
  settings = {
    'sampling': sampling, 'max_tokens': flags.max_tokens, 'stop': tuple(flags.stop), 'top': flags.top,
  }  # fmt: skip
  prompts = answers.read_prompts(pathlib.Path(flags.prompts)) if flags.prompts else []
  keep_compiled()
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax tells what it does when it only reads
  choose = best_of.by_reward(flags.reward) if flags.reward else None
  samples = flags.best_of or flags.samples
  how = {name: getattr(flags, name) for name in ('int8', 'penalty', 'draft', 'ngram', 'guesses')}
  with Mesh().use(jax.devices()[:1]):
    generator = load(
      flags.checkpoint, hf=flags.hf, tokenizer_file=flags.tokenizer, room=flags.room,
      slots=flags.slots, beam_count=flags.beams, **how,
    )  # fmt: skip
    if flags.interactive:
      terminal.converse(generator, settings)
    elif flags.prompt is not None:
      prompt = sys.stdin.read() if flags.prompt == '-' else flags.prompt
      if choose:
        print(choose(prompt, generator([prompt], samples=samples, **settings))[0].text)
        return
      for request in generator.requests(prompt, flags.samples, **settings):
        terminal.show(generator, prompt, {**settings, 'sampling': request.sampling})
    else:
      source = {'source': generator.source, 'tokenizer': flags.tokenizer, 'beams': flags.beams}
      source |= {'samples': samples} | ({'kept': describe(choose)} if choose else {})
      identity = answers.identity_of(settings | source | how)
      rows = answers.answer_all(
        generator, prompts, pathlib.Path(flags.out), identity,
        samples=samples, choose=choose, **settings,
      )  # fmt: skip
      print(f'{len(prompts)} prompts answered, {len(list(rows))} of them now: {flags.out}')


if __name__ == '__main__':
  cli.run(main, FLAGS)
