"""Converts Hugging Face checkpoints to ours and back, and the adapters of peft.

    python -m research.convert --from_hf=FOLDER --out=FOLDER   # or a GGUF file
    python -m research.convert --to_hf=FOLDER --checkpoint=FOLDER --gin_file=FILE --model_type=llama
    python -m research.convert --from_peft=FOLDER --base=FOLDER --out=FOLDER --model_type=llama
    python -m research.convert --to_peft=FOLDER --checkpoint=FOLDER --gin_file=FILE --model_type=llama

The first reads config.json and safetensors, packed weights too (GPTQ, AWQ, bitsandbytes, compressed-tensors,
fp8), or a GGUF file, and writes a float32 checkpoint with model.gin beside it; the tokenizer is kept too. The
second writes config.json, safetensors and the tokenizer; LoRA, its kin and quantised matrices become the
matrices that they stand for. The third puts an adapter of peft on a base that the first wrote, the fourth
writes one. Tensors are read and written one at a time, so that memory never holds a model (adapters aside);
names that are unknown or missing are an error that lists them. Nothing is downloaded.
"""

import pathlib

from research.core import cli, storage
from research.core.errors import UserError
from research.huggingface.files import DTYPES, FILE_BYTES

# The directions, and the flags that each needs.
NEEDS = {
  'from_hf': ('out',),
  'to_hf': ('checkpoint', 'gin_file', 'model_type'),
  'from_peft': ('base', 'out', 'model_type'),
  'to_peft': ('checkpoint', 'gin_file', 'model_type'),
}


def main(flags) -> None:
  """Converts in the direction that the flags say."""
  from research.huggingface import inwards  # jax: --help must not cost seconds

  folders = {
    name: _folder(name, value)
    for name in ('from_hf', 'out', 'to_hf', 'checkpoint', 'from_peft', 'to_peft', 'base')
    if (value := getattr(flags, name)) and (name != 'base' or flags.from_peft)
  }
  if flags.from_hf:
    inwards.from_hf(folders['from_hf'], folders['out'])
  elif flags.from_peft:
    from research.tuning import peft

    peft.load(folders['from_peft'], folders['base'], folders['out'], flags.model_type)
  else:
    _write(flags, folders)
  print(f'wrote {flags.out or flags.to_hf or flags.to_peft}')


def _write(flags, folders: dict[str, pathlib.Path]) -> None:
  """Writes a checkpoint of ours for Hugging Face: a whole model, or adapters."""
  from research.checkpoints import streamed
  from research.core import configs
  from research.huggingface import outwards
  from research.tuning import merge, peft

  gin = configs.load(flags.gin_file, flags.gin, root='MODEL')
  source = folders['checkpoint']
  params = streamed.Params(source)
  if flags.to_peft:
    values = peft.params_of(gin.tree(), params)
    peft.save(folders['to_peft'], gin.tree(), values, flags.model_type, base=flags.base or '')
    return
  if merge.has_weights(gin.tree()):
    model, params = merge.merged(gin.tree(), peft.params_of(gin.tree(), params))
    gin = merge.Tree(model)
  outwards.save(
    folders['to_hf'], gin, params, flags.model_type, flags.dtype, flags.file_bytes, source
  )


def _folder(flag: str, name: str) -> pathlib.Path:
  """The folder that a flag names, on a disk."""
  folder = storage.place(name, f'--{flag}')
  if storage.is_bucket(folder):
    raise UserError(f'--{flag}={name} is a folder of a bucket; copy it here, and name the copy.')
  return folder


def _flags():
  parser = cli.parser('convert', __doc__, gin=False)
  parser.add_argument('--from_hf', metavar='FOLDER', help='config.json and *.safetensors to read')
  parser.add_argument('--to_hf', metavar='FOLDER', help='config.json and *.safetensors to write')
  parser.add_argument('--from_peft', metavar='FOLDER', help='an adapter of peft to read')
  parser.add_argument('--to_peft', metavar='FOLDER', help='an adapter for peft to write')
  parser.add_argument('--out', metavar='FOLDER', help='our checkpoint to write')
  parser.add_argument(
    '--base', metavar='FOLDER', help='the base of an adapter: ours to read, or its name to write'
  )
  parser.add_argument('--checkpoint', metavar='FOLDER', help='our checkpoint to read')
  parser.add_argument('--gin_file', action='append', metavar='FILE', help='its MODEL')
  parser.add_argument('--model_type', help='the Hugging Face family, as llama')
  parser.add_argument('--dtype', default='float32', choices=list(DTYPES.values()), help='to write')
  parser.add_argument(
    '--file_bytes', type=float, default=FILE_BYTES, help='a file, with --to_hf (default 5e9)'
  )
  flags = cli.parse(parser)
  chosen = [name for name in NEEDS if getattr(flags, name)]
  if len(chosen) != 1:
    parser.error('give one of ' + ', '.join(f'--{name}' for name in NEEDS) + '.')
  for name in NEEDS[chosen[0]]:
    if not getattr(flags, name):
      parser.error(f'--{name} is needed with --{chosen[0]}.')
  return flags


if __name__ == '__main__':
  cli.run(main, _flags())
