"""The flags of `python -m research.generate`. Imports nothing heavy, so a wrong flag is an error at once."""

import argparse

from research.core import cli

# How a token is chosen, with defaults: see `inference.sampling.Sampling`.
SAMPLING = {
  'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'typical': 1.0, 'repetition_penalty': 1.0,
  'presence_penalty': 0.0, 'frequency_penalty': 0.0, 'seed': 0,
}  # fmt: skip
NUMBERS = {
  'samples': (1, 'answers to each prompt'),
  'best_of': (0, 'draw so many answers, and keep the one that --reward scores highest; 0 for none'),
  'top': (0, 'report so many of the likeliest tokens at each place'),
  'room': (0, 'the most tokens of a prompt and its answer; 0 is the length that it was trained on'),
  'slots': (8, 'prompts that are answered at once'),
  'together': (1, 'short prompts that are read at once; a quarter of --slots is fast for many'),
  'beams': (0, 'beam search with so many beams; 0 for none'),
  'ngram': (0, 'guess the tokens that followed an earlier occurrence of the last so many; 0 for none'),
  'guesses': (4, 'tokens that --draft or --ngram guesses per step of the model'),
}  # fmt: skip
TEXTS = {
  'checkpoint': ('DIR', "a run's or a converted model's folder"),
  'hf': ('FOLDER', 'config.json, *.safetensors and a tokenizer'),
  'tokenizer': ('FILE', "a tokenizer.json or .model in place of the checkpoint's"),
  'draft': ('DIR', 'a smaller model that guesses tokens: a folder as for --checkpoint or --hf'),
  'prompt': ('TEXT', '- for standard input'),
  'prompts': ('FILE', 'JSON lines: strings, or objects with "prompt"'),
  'out': ('FILE', 'answers as JSON lines (with --prompts)'),
  'reward': ('FILE.gin', 'its REWARD scores answers (with --best_of)'),
}  # fmt: skip
FILTERS = ('top_k', 'top_p', 'min_p', 'typical')
# What a line of a file of prompts cannot say, because it holds for all lines.
SETTINGS = {*SAMPLING, *NUMBERS, *TEXTS, 'max_tokens', 'penalty', 'stop', 'int8'} - {'prompt'}
PENALTIES = {
  'length': 'log-likelihood / length (transformers)',
  'wu': 'log-likelihood / ((5 + length) / 6)^0.6 (T5X)',
}


def parse(description: str) -> argparse.Namespace:
  """Parses the command line; ends the program with an error if the flags are wrong."""
  parser = cli.parser('generate', description, gin=False)
  for name, (metavar, what) in TEXTS.items():
    parser.add_argument(f'--{name}', action=_Once, metavar=metavar, help=what)
  for name, (default, what) in NUMBERS.items():
    parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (default {default})')
  what = 'the most tokens of an answer (default 128, or what the room leaves)'
  parser.add_argument('--max_tokens', type=int, help=what)
  for name, default in SAMPLING.items():
    kind = type(default)
    parser.add_argument(f'--{name}', type=kind, default=default, help=f'(default {default})')
  what = '; '.join(f'{name}: {formula}' for name, formula in PENALTIES.items())
  parser.add_argument('--penalty', choices=PENALTIES, help=f'of beams (default length). {what}')
  what = 'a string that ends an answer; may be repeated'
  parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help=what)
  parser.add_argument('--interactive', action='store_true', help='asks for prompts')
  parser.add_argument('--int8', action='store_true', help='keys and values in whole numbers')
  flags = cli.parse(parser)
  wrong = _conflict(flags) or _without_effect(flags)
  if wrong:
    parser.error(wrong)
  flags.penalty = flags.penalty or 'length'
  return flags


class _Once(argparse.Action):
  """Stores a text. A second one would replace the first without a word, so it is an error."""

  def __call__(self, parser, namespace, value, option=None):
    if getattr(namespace, self.dest) is not None:
      parser.error(f'{option} is given twice; give it once.')
    setattr(namespace, self.dest, value)


def _without_effect(flags: argparse.Namespace) -> str:
  """Returns a sentence about a flag that would change nothing; empty if there is none."""
  if flags.penalty and not flags.beams:
    return '--penalty is of beams: give --beams, or leave it out.'
  if flags.guesses != NUMBERS['guesses'][0] and not (flags.draft or flags.ngram):
    return '--guesses needs --draft or --ngram; give one of them, or leave it out.'
  if flags.top and not flags.prompts:
    return (
      '--top is written to the answers of --prompts: give --prompts and --out, or leave it out.'
    )
  if flags.together != 1 and not flags.prompts:
    return '--together is for the many prompts of --prompts: give that, or leave it out.'
  if flags.temperature == 0:
    if flags.samples > 1:
      return '--samples gives different answers only with --temperature above 0; set it.'
    for name in FILTERS:
      if getattr(flags, name) != SAMPLING[name]:
        return f'--{name} needs --temperature above 0: without it the likeliest token is taken.'
  return ''


def _conflict(flags: argparse.Namespace) -> str:
  """Returns a sentence about flags that cannot be combined; empty if there are none."""
  if bool(flags.checkpoint) == bool(flags.hf):
    return 'give one of --checkpoint and --hf.'
  if (flags.prompt is not None) + bool(flags.prompts) + flags.interactive != 1:
    return 'give one of --prompt, --prompts and --interactive.'
  if bool(flags.prompts) != bool(flags.out):
    return '--prompts and --out go together.'
  whole = [name for name in ('beams', 'draft', 'ngram') if getattr(flags, name)]
  if len(whole) > 1:
    return f'give one of --{" and --".join(whole)}.'
  defaults = {'top': 0, 'int8': False, 'together': 1}
  for name, default in defaults.items() if whole else ():
    if getattr(flags, name) != default:
      return f'--{name} does not work with --{whole[0]}; leave one of the two out.'
  if flags.together < 1:
    return f'--together={flags.together} must be 1 or more.'
  if flags.together > max(flags.slots, 1):
    return f'--together={flags.together} must be at most --slots={flags.slots}.'
  if bool(flags.best_of) != bool(flags.reward):
    return '--best_of and --reward go together.'
  if flags.best_of and (flags.best_of < 2 or flags.samples > 1 or flags.interactive or whole):
    return (
      '--best_of keeps one of 2 answers or more: leave out --samples, --interactive, --beams, --draft and '
      '--ngram.'
    )
  if flags.best_of and not flags.temperature:
    return '--best_of draws different answers: set --temperature, to 1 for the model as it is.'
  if flags.beams and (flags.samples > 1 or flags.temperature):
    return '--beams searches for the likeliest answer: leave out --samples and --temperature.'
  return ''
