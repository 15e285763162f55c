"""What all commands share: flags, errors as one sentence, the environment. Imports nothing heavy."""

import argparse
import os
import sys
from collections.abc import Callable

from research.core.errors import UserError, did_you_mean

# Fresh 4 KiB pages cost jax on CPU a third of its time; huge pages must be asked for before the process starts.
CPU_ENVIRONMENT = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    self.exit(2, f'{self.prog}: {message}\n')


def parser(command: str, description: str, gin: bool = True) -> argparse.ArgumentParser:
  """The flags of `python -m research.<command>`; `gin` adds --gin_file and --gin.NAME=VALUE."""
  first, _, rest = description.partition('\n')
  result = _Parser(
    prog=f'python -m research.{command}',
    description=first,
    epilog=rest.strip(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  if gin:
    result.add_argument(
      '--gin_file',
      action='append',
      required=True,
      metavar='FILE',
      help='a gin file; several are read in order',
    )
    result.epilog = (
      (result.epilog or '')
      + '\n\n--gin.Class.argument=VALUE and --gin.MACRO=VALUE override what the files say; '
      'a string wants quotes inside: --gin.Run.name="\'a\'".'
    ).strip()
  return result


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
  """Parsed flags, with the --gin.X=Y ones as the list `flags.gin`."""
  argv = sys.argv[1:] if argv is None else argv
  gin = [arg.removeprefix('--gin.') for arg in argv if arg.startswith('--gin.')]
  flags, unknown = parser.parse_known_args([arg for arg in argv if not arg.startswith('--gin.')])
  if unknown:
    known = [option for action in parser._actions for option in action.option_strings]
    parser.error(f'no flag {unknown[0]}.{did_you_mean(unknown[0].split("=")[0], known)}')
  flags.gin = gin
  return flags


def use_huge_pages() -> None:
  """Starts this command again with the environment that jax on a CPU wants, once; a few milliseconds."""
  missing = {k: v for k, v in CPU_ENVIRONMENT.items() if k not in os.environ}
  if missing and sys.platform == 'linux':
    os.environ.update(missing)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(main: Callable[..., int | None], *args) -> None:
  """Runs `main` and exits: 2 with one sentence where the input was wrong."""
  try:
    sys.exit(main(*args) or 0)
  except UserError as error:
    sys.exit(_say(f'error: {error}', 2))
  except KeyboardInterrupt:
    sys.exit(_say('interrupted', 130))


def _say(message: str, code: int) -> int:
  print(message, file=sys.stderr, flush=True)
  return code
