"""Generates text with a checkpoint.

    python -m research.generate --checkpoint=runs/tiny --prompt='def f(x):' --temperature=0.8
    python -m research.generate --hf=FOLDER --prompts=prompts.jsonl --out=answers.jsonl --samples=4

The checkpoint is a run's workdir or a converted model's folder; --hf reads a Hugging Face folder as it is.
--prompt=- reads the prompt from standard input. With --prompts the answers are JSON lines; started again, the
command answers only what is missing.
"""

import pathlib
import sys

from research.core import cli

# How a token is chosen: `inference.sampling.Sampling` says what each means.
SAMPLING = {
  'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'typical': 1.0, 'repetition_penalty': 1.0,
  'presence_penalty': 0.0, 'frequency_penalty': 0.0, 'seed': 0,
}  # fmt: skip
NUMBERS = {
  'max_tokens': (128, 'the most tokens of an answer'), 'samples': (1, 'answers to each prompt'),
  'top': (0, 'tell so many likely tokens at each place'),
  'room': (0, 'tokens of a prompt and its answer; 0 is the length that it was trained on'),
  'slots': (8, 'prompts that are answered at a time'),
}  # fmt: skip
TEXTS = {
  'checkpoint': ('DIR', "a run's or a converted model's folder"),
  'hf': ('FOLDER', 'config.json, *.safetensors and a tokenizer'),
  'tokenizer': ('FILE', "a tokenizer.json or .model in place of the checkpoint's"),
  'prompt': ('TEXT', '- for standard input'),
  'prompts': ('FILE', 'JSON lines: strings, or objects with "prompt"'),
  'out': ('FILE', 'answers as JSON lines (with --prompts)'),
}  # fmt: skip


def _flags():
  parser = cli.parser('generate', __doc__, gin=False)
  for name, (metavar, what) in TEXTS.items():
    parser.add_argument(f'--{name}', metavar=metavar, help=what)
  for name, (default, what) in NUMBERS.items():
    parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (default {default})')
  for name, default in SAMPLING.items():
    kind = type(default)
    parser.add_argument(f'--{name}', type=kind, default=default, help=f'(default {default})')
  what = 'a string that ends an answer; may be given several times'
  parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help=what)
  parser.add_argument('--interactive', action='store_true', help='asks for prompts')
  parser.add_argument('--int8', action='store_true', help='keys and values in whole numbers')
  flags = cli.parse(parser)
  if bool(flags.checkpoint) == bool(flags.hf):
    parser.error('give one of --checkpoint and --hf.')
  if (flags.prompt is not None) + bool(flags.prompts) + flags.interactive != 1:
    parser.error('give one of --prompt, --prompts and --interactive.')
  if bool(flags.prompts) != bool(flags.out):
    parser.error('--prompts and --out go together.')
  return flags


if __name__ == '__main__':
  FLAGS = _flags()
  cli.use_huge_pages()

from research.core import configs
from research.data.encoding import make_encoding
from research.evaluation import loading
from research.inference import answers, terminal, tokenizer
from research.inference.generator import Generator, make_generator
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh

CONVERTED_ROOM = 1024  # of a converted model, whose folder does not say what it was trained on


def load(
  checkpoint: str | None = None,
  *,
  hf: str | None = None,
  tokenizer_file: str | None = None,
  room: int = 0,
  slots: int = 8,
  int8: bool = False,
) -> Generator:
  """A model that generates, from a run's or a converted model's folder or from a Hugging Face folder.

  Call it, and use the generator, under a mesh: `with Mesh().use(jax.devices()[:1]): ...`.

  Raises:
    UserError: there is no such model, it sees both ways, or the tokenizer is not its own.
  """
  import jax
  import jax.numpy as jnp

  if hf:
    from research.huggingface import inwards

    text, arrays = inwards.load(pathlib.Path(hf))
    config = configs.Config('MODEL')
    config._read(text, 'model.gin')
    model, run, folder = config.tree(), None, pathlib.Path(hf)
    params, source = jax.tree.map(jnp.asarray, arrays), hf
  else:
    opened = loading.open_folder(checkpoint)
    model, run, folder = opened.model, opened.run, opened.path / 'huggingface'
    params, source = loading.read_params(opened), f'{checkpoint} at step {opened.step}'
  abstract = loading.abstract_model(model)
  architecture = loading.architecture_of(run, abstract)
  length = room or (loading.length_of(run) if run else CONVERTED_ROOM)
  if tokenizer_file:
    own = tokenizer.of_file(pathlib.Path(tokenizer_file))
  elif run:
    encoding = make_encoding(loading.vocabulary_of(run))
    own = tokenizer.of_encoding(encoding, architecture == 'encoder_decoder')
  else:
    own = tokenizer.of_folder(folder)
  return make_generator(
    abstract, params, own, architecture, room=length, slots=slots, int8=int8, source=source
  )


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
  with Mesh().use(jax.devices()[:1]):
    generator = load(
      flags.checkpoint, hf=flags.hf, tokenizer_file=flags.tokenizer, room=flags.room,
      slots=flags.slots, int8=flags.int8,
    )  # fmt: skip
    if flags.interactive:
      terminal.converse(generator, settings)
    elif flags.prompt is not None:
      prompt = sys.stdin.read() if flags.prompt == '-' else flags.prompt
      for request in generator.requests(prompt, flags.samples, **settings):
        terminal.show(generator, prompt, {**settings, 'sampling': request.sampling})
    else:
      source = {'source': generator.source, 'tokenizer': flags.tokenizer, 'int8': flags.int8}
      identity = answers.identity_of(settings | source | {'samples': flags.samples})
      out = pathlib.Path(flags.out)
      rows = answers.answer_all(
        generator, prompts, out, identity, samples=flags.samples, **settings
      )
      now = sum(1 for _ in rows)
      print(f'{len(prompts)} prompts answered, {now} of them now: {out}')


if __name__ == '__main__':
  cli.run(main, FLAGS)
