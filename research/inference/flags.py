"""The flags of `python -m research.generate`. Imports nothing heavy, so a wrong flag is an error at once."""

import argparse

from research.core import cli

# How a token is chosen, with defaults: see `inference.sampling.Sampling`.
SAMPLING = {
  'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'typical': 1.0, 'repetition_penalty': 1.0,
  'presence_penalty': 0.0, 'frequency_penalty': 0.0, 'seed': 0,
}  # fmt: skip
NUMBERS = {
  'max_tokens': (128, 'the most tokens of an answer'),
  'samples': (1, 'answers to each prompt'),
  'best_of': (0, 'draw so many answers, and keep the one that --reward scores highest; 0 for none'),
  'top': (0, 'report so many of the likeliest tokens at each place'),
  'room': (0, 'the most tokens of a prompt and its answer; 0 is the length that it was trained on'),
  'slots': (8, 'prompts that are answered at once'),
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
PENALTIES = {
  'length': 'log-likelihood / length (transformers)',
  'wu': 'log-likelihood / ((5 + length) / 6)^0.6 (T5X)',
}


def parse(description: str) -> argparse.Namespace:
  """Parses the command line; ends the program with an error if the flags are wrong."""
  parser = cli.parser('generate', description, gin=False)
  for name, (metavar, what) in TEXTS.items():
    parser.add_argument(f'--{name}', metavar=metavar, help=what)
  for name, (default, what) in NUMBERS.items():
    parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (default {default})')
  for name, default in SAMPLING.items():
    kind = type(default)
    parser.add_argument(f'--{name}', type=kind, default=default, help=f'(default {default})')
  what = '; '.join(f'{name}: {formula}' for name, formula in PENALTIES.items())
  parser.add_argument('--penalty', choices=PENALTIES, default='length', help=f'of beams. {what}')
  what = 'a string that ends an answer; may be repeated'
  parser.add_argument('--stop', action='append', default=[], metavar='TEXT', help=what)
  parser.add_argument('--interactive', action='store_true', help='asks for prompts')
  parser.add_argument('--int8', action='store_true', help='keys and values in whole numbers')
  flags = cli.parse(parser)
  wrong = _conflict(flags)
  if wrong:
    parser.error(wrong)
  return flags


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
  for name in ('top', 'int8') if whole else ():
    if getattr(flags, name):
      return f'--{name} does not work with --{whole[0]}; leave one of the two out.'
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
