"""Counts a model: `python -m research.count --gin_file=gin/models/llama/7b.gin`."""

import argparse
import dataclasses
import glob
import pathlib

from research.core import cli
from research.core.errors import UserError

EXAMPLES = """
It prints N by each counting convention, FLOPs per token by each convention, bytes of cache per token, and what
the last token of a sequence costs to generate (decode_...).
research/model/counts.py says what each line means.

  python -m research.count --gin_file=gin/models/llama/7b.gin --length=2048
  python -m research.count --gin_file=gin/models/qwen3/0_6b.gin --gin.EMBED=64 --gin.LAYERS=2
  python -m research.count --presets='gin/models/qwen*/*.gin'
"""

# Heading of a column of the table of presets, and the field of `counts.Counts` under it.
COLUMNS = {
  'N': 'params_total',
  'active': 'params_active',
  'non-embedding': 'params_non_embedding',
  'with head': 'params_with_head',
  'FLOPs/token': 'flops_attention_causal',
  'cache bytes/token': 'kv_cache_bytes_per_token',
}


def make_parser() -> argparse.ArgumentParser:
  description = 'Count the parameters, FLOPs and cache of a model.\n' + EXAMPLES
  parser = cli.parser('count', description, gin=False)
  models = parser.add_mutually_exclusive_group(required=True)
  models.add_argument('--gin_file', action='append', metavar='FILE', help='defines MODEL; repeats')
  what = 'files that each define a MODEL: prints a line for each'
  models.add_argument('--presets', metavar='PATTERN', help=what)
  parser.add_argument('--length', type=int, default=2048, help='target tokens in a sequence')
  what = 'input tokens in a sequence, of an encoder-decoder (default: as --length)'
  parser.add_argument('--inputs', type=int, help=what)
  parser.epilog += (
    '\n\n--gin.Class.argument=VALUE and --gin.MACRO=VALUE override what the files say.'
  )
  return parser


def table(counts, prefix: str = '') -> str:
  """The counts as lines of text: the exact number, and a short form beside it."""
  lines = []
  for name, value in dataclasses.asdict(counts).items():
    scale = max(0, min(5, (len(str(round(value))) - 1) // 3))
    short = f'{value / 1000**scale:.4g}{["", "K", "M", "B", "T", "P"][scale]}'
    lines.append(f'{prefix + name:28}{round(value):>24,}  {short:>8}')
  return '\n'.join(lines)


def row(name: str, counts) -> str:
  """One line of the table of presets, under the names of `COLUMNS`."""
  values = (round(getattr(counts, field)) for field in COLUMNS.values())
  return f'{name:32}' + ''.join(f'{value:>20,}' for value in values)


def whole_models(pattern: str) -> list[str]:
  """The gin files of a pattern that define a whole model.

  Raises:
    UserError: no file of the pattern does.
  """
  # A file that several sizes share is not a whole model. Its header lists what to set.
  paths = sorted(
    path for path in glob.glob(pattern) if 'Set: ' not in pathlib.Path(path).read_text()
  )
  if not paths:
    raise UserError(f'--presets={pattern}: no such file defines a whole model.')
  return paths


def main(flags: argparse.Namespace) -> None:
  paths = None if flags.gin_file else whole_models(flags.presets)
  # These import jax, which takes seconds: wrong flags have been refused before.
  from research.core import configs
  from research.model.counts import abstract, count, count_decoding

  lengths = {'targets': flags.length, 'inputs': flags.inputs or flags.length}

  if paths is None:
    config = configs.load(flags.gin_file, flags.gin, root='MODEL')
    model = config.tree()
    with config.explains():
      print(f'{" ".join(flags.gin_file)}, length {flags.length:,}')
      print(table(count(model, lengths)))
      # An encoder does not generate.
      if getattr(abstract(model), 'causal', True):
        print(table(count_decoding(model, lengths), prefix='decode_'))
    return
  print(f'{"":32}' + ''.join(f'{name:>20}' for name in COLUMNS))
  for path in paths:
    config = configs.load([path], flags.gin, root='MODEL')
    model = config.tree()
    with config.explains():
      print(row(path, count(model, lengths)), flush=True)


if __name__ == '__main__':
  cli.run(main, cli.parse(make_parser()))
