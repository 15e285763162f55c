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


def parser() -> argparse.ArgumentParser:
  p = cli.parser(
    'count', 'Count the parameters, FLOPs and cache of a model.\n' + EXAMPLES, gin=False
  )
  what = p.add_mutually_exclusive_group(required=True)
  what.add_argument('--gin_file', action='append', metavar='FILE', help='defines MODEL; repeats')
  what.add_argument(
    '--presets', metavar='PATTERN', help='files that each define a MODEL: prints a line for each'
  )
  p.add_argument('--length', type=int, default=2048, help='target tokens in a sequence')
  p.add_argument(
    '--inputs', type=int, help='input tokens in a sequence (encoder-decoder only; as --length)'
  )
  p.epilog += '\n\n--gin.Class.argument=VALUE and --gin.MACRO=VALUE override what the files say.'
  return p


def table(counts, prefix: str = '') -> str:
  """The counts as lines of text, with digits grouped and a short form beside."""
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
    UserError: there is none.
  """
  # What several sizes share says in its header what is to be set, and is no model by itself.
  paths = sorted(
    path for path in glob.glob(pattern) if 'Set: ' not in pathlib.Path(path).read_text()
  )
  if not paths:
    raise UserError(f'--presets={pattern}: no file of that pattern is a whole model.')
  return paths


def main(flags: argparse.Namespace) -> None:
  paths = None if flags.gin_file else whole_models(flags.presets)
  # jax starts here, after the flags are known to be right.
  from research.core import configs
  from research.model.counts import abstract, count, count_decoding

  lengths = {'targets': flags.length, 'inputs': flags.inputs or flags.length}

  if paths is None:
    config = configs.load(flags.gin_file, flags.gin, root='MODEL')
    model = config.tree()
    with config.explains():
      print(f'{" ".join(flags.gin_file)}, length {flags.length:,}')
      print(table(count(model, lengths)))
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
  cli.run(main, cli.parse(parser()))
