"""Compiles a run's train step for devices that this machine may not have, and reports its memory and time.

It compiles the same step as `research.train`, with shapes in place of arrays: nothing is allocated or run. With
--decode it compiles the generation of text by the run's model: the prefill of prompts, and one decoding step.

TPU slices need libtpu, on any Linux machine; `cpu:8` and `here` need nothing. The memory is XLA's own figure.
The time is a roofline: the largest of the times of arithmetic, memory and network, each at the chip's peak.
"""

import json

from research.compilation import chips
from research.core import cli
from research.core.errors import UserError

if __name__ == '__main__':
  _parser = cli.parser('compile', __doc__)
  _parser.add_argument('--topology', default='here', help='v5e:16x16, v5p:4x4x4, cpu:8, here, ...')
  _parser.add_argument('--slices', type=int, default=1, help='number of slices, joined by DCN')
  _parser.add_argument('--json', metavar='FILE', help='write the report there')
  _parser.add_argument('--hlo', metavar='FILE', help='write the compiled program there')
  _parser.add_argument(
    '--search',
    action='store_true',
    help='try meshes, microbatches and rematerialisation, and rank what fits',
  )
  _parser.add_argument('--decode', action='store_true', help='decoding in place of training')
  _parser.add_argument('--batch', type=int, help='of --decode: rows')
  _parser.add_argument('--room', type=int, help='of --decode: the most tokens of a row')
  _parser.add_argument(
    '--prompt',
    type=int,
    default=0,
    help='of --decode: tokens of a prompt (default half of the room)',
  )
  FLAGS = cli.parse(_parser)
  for _name, _least in (('batch', 1), ('room', 2)):
    _given = getattr(FLAGS, _name)
    if _given is not None and _given < _least:
      _parser.error(f'--{_name}={_given} must be {_least} or more.')
  if FLAGS.decode and None in (FLAGS.batch, FLAGS.room):
    _parser.error('--decode needs --batch and --room.')
  if FLAGS.decode and (FLAGS.search or FLAGS.hlo):
    _parser.error('--decode goes with neither --search nor --hlo.')
  if not FLAGS.decode and (FLAGS.batch or FLAGS.room or FLAGS.prompt):
    _parser.error('--batch, --room and --prompt go with --decode; a train step has Run.batch_size.')
  try:
    chips.prepare(FLAGS.topology)
  except UserError as error:
    _parser.exit(2, f'error: {error}\n')


from research.compilation import decoding
from research.compilation.report import compile_run
from research.compilation.search import search, show_rows
from research.compilation.show import show
from research.core import configs


def main(flags) -> int:
  """Compiles as the flags say, and prints the report."""
  config = configs.load(flags.gin_file, flags.gin)
  with config.explains():
    run = config.build()
    if flags.search:
      report = search(run, flags)
      print(show_rows(report))
    elif flags.decode:
      report = decoding.compile_decode(
        run, flags.topology, flags.slices, batch=flags.batch, room=flags.room, prompt=flags.prompt
      )
      print(decoding.show(report))
    else:
      report = compile_run(run, flags.topology, flags.slices, flags.hlo)
      print(show(report))
  if flags.json:
    with open(flags.json, 'w') as file:
      file.write(json.dumps(report, indent=1) + '\n')
  return 0


if __name__ == '__main__':
  cli.run(main, FLAGS)
