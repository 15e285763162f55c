"""Converts Hugging Face checkpoints to ours and back.

    python -m research.convert --from_hf=FOLDER --out=FOLDER
    python -m research.convert --to_hf=FOLDER --checkpoint=FOLDER --gin_file=FOLDER/model.gin

The first reads config.json and safetensors, and writes a checkpoint with model.gin beside it; the tokenizer is
kept too. The second writes config.json, safetensors and the tokenizer. Tensors are read and written one at a
time, so that memory never holds a model; names that are unknown or missing are an error that lists them.
Nothing is downloaded.
"""

import pathlib

from research.core import cli, storage
from research.core.errors import UserError
from research.huggingface.files import DTYPES, FILE_BYTES


def main(flags) -> None:
  """Converts in the direction that the flags say."""
  from research.huggingface import inwards, outwards  # jax: --help must not cost seconds

  folders = {
    name: _folder(name, value)
    for name in ('from_hf', 'out', 'to_hf', 'checkpoint')
    if (value := getattr(flags, name))
  }
  if flags.from_hf:
    inwards.from_hf(folders['from_hf'], folders['out'])
  else:
    from research.checkpoints import streamed
    from research.core import configs

    gin = configs.load(flags.gin_file, flags.gin, root='MODEL')
    source = folders['checkpoint']
    params = streamed.Params(source)
    outwards.save(
      folders['to_hf'], gin, params, flags.model_type, flags.dtype, flags.file_bytes, source
    )
  print(f'wrote {flags.out or flags.to_hf}')


def _folder(flag: str, name: str) -> pathlib.Path:
  """The folder that a flag names, on a disk."""
  folder = storage.place(name, f'--{flag}')
  if storage.is_bucket(folder):
    raise UserError(f'--{flag}={name} is a folder of a bucket; copy it here, and name the copy.')
  return folder


def _flags():
  parser = cli.parser('convert', __doc__, gin=False)
  parser.add_argument('--from_hf', metavar='FOLDER', help='config.json and *.safetensors to read')
  parser.add_argument('--out', metavar='FOLDER', help='our checkpoint to write, with --from_hf')
  parser.add_argument('--to_hf', metavar='FOLDER', help='config.json and *.safetensors to write')
  parser.add_argument('--checkpoint', metavar='FOLDER', help='our checkpoint to read, with --to_hf')
  parser.add_argument('--gin_file', action='append', metavar='FILE', help='its MODEL, with --to_hf')
  parser.add_argument(
    '--model_type', help='the Hugging Face family to write, as llama, with --to_hf'
  )
  parser.add_argument('--dtype', default='float32', choices=list(DTYPES.values()), help='to write')
  parser.add_argument(
    '--file_bytes', type=float, default=FILE_BYTES, help='a file, with --to_hf (default 5e9)'
  )
  flags = cli.parse(parser)
  if bool(flags.from_hf) == bool(flags.to_hf):
    parser.error('give one of --from_hf and --to_hf.')
  needed = ('out',) if flags.from_hf else ('checkpoint', 'gin_file', 'model_type')
  for name in needed:
    if not getattr(flags, name):
      parser.error(f'--{name} is needed with --{"from_hf" if flags.from_hf else "to_hf"}.')
  return flags


if __name__ == '__main__':
  cli.run(main, _flags())
