"""Checks that model, data, loss and devices fit together, before anything is compiled."""

import dataclasses
import pathlib

from research.core.errors import Invalid
from research.data.batches import Frozen, FrozenMixture
from research.model import counts
from research.parallel.axes import axis_size
from research.parallel.hosts import host_share
from research.parallel.mesh import Mesh
from research.training import learning
from research.training.program import make_program
from research.training.run import Run


def check_fits(
  run: Run, vocab: int, inputs: tuple[str, ...], train: Frozen, validation: Frozen
) -> None:
  """Raises Invalid if model, data, loss and devices do not fit together.

  Args:
    run: the run.
    vocab: how many logits the model has.
    inputs: prefixes of the token features that the model reads, such as 'decoder'.
    train: the opened training stream.
    validation: the opened validation stream.
  """
  check_vocabulary(run, vocab, train)
  # A folder with a model.gin holds a model that was converted from another project's files.
  converted = run.init is not None and (pathlib.Path(run.init.folder) / 'model.gin').is_file()
  parts = train.parts.values() if isinstance(train, FrozenMixture) else [train]
  # `offset=1` shifts every id of such a vocabulary to leave 0 for padding.
  moved = any('offset=1' in str(part.manifest.get('vocabulary')) for part in parts)
  if converted and moved:
    why = (
      'its tokenizer uses id 0 for text, and here id 0 is padding: every id of the data is one more than the '
      'id that the model was trained with. Fine-tune a model of another tokenizer.'
    )
    raise Invalid(Run, 'init', why)
  missing = [name for name in inputs if f'{name}_input_tokens' not in train.features]
  if missing:
    raise Invalid(
      Run,
      'train',
      f'the model reads {missing[0]} tokens, and the rows of {run.train.name} have none; choose an '
      'objective or an architecture that fits.',
    )
  for key in run.loss.reads:
    if key not in train.features:
      why = f'{type(run.loss).__name__} reads {key}, and the rows of {run.train.name} have no such feature.'
      raise Invalid(Run, 'loss', why)
  for key in run.loss.evaluation.reads:
    if key not in validation.features:
      name = type(run.loss.evaluation).__name__
      raise Invalid(Run, 'validation', f'its rows have no {key}, and {name} reads it.')
  run.loss.check(run, vocab)
  check_divides(run)


def check_vocabulary(run: Run, vocab: int, train: Frozen) -> None:
  """Raises Invalid where the data has tokens that the model, of `vocab` tokens, does not know."""
  if vocab < train.vocab_size:
    owner = getattr(run.model, 'func', run.model)
    why = f'{vocab} is less than the {train.vocab_size} tokens of the data; set it to that or more.'
    raise Invalid(owner, 'vocab', why)


def check_start(run: Run) -> None:
  """Raises UserError if the run cannot start from its checkpoint, under the mesh in use."""
  if run.init is not None:
    _ = make_program(run).sources  # the property raises


def check_divides(run: Run) -> None:
  """Raises Invalid if the mesh in use does not divide the run's batches."""
  devices = axis_size('batch') * run.microbatches
  _, hosts = host_share()
  parts = axis_size('sequence')
  # Sizes come in the order of the stages. The last one is `batch_size`, the others are the curriculum's.
  field = 'batch_size'
  for size, cut in reversed(run.batches.sizes()):
    if size * cut % devices:
      raise Invalid(
        Run, field, f'{size * cut} is not a multiple of {devices}, the devices a batch is split over '
        'times the microbatches.',
      )  # fmt: skip
    if size % hosts:
      raise Invalid(Run, field, f'{size} examples do not divide equally among {hosts} hosts.')
    for name, length in run.train.lengths.items():
      if length // cut % parts:
        why = f'{parts} does not divide the length {length // cut} of the {name}; '
        why += 'change Mesh.context or that length.'
        raise Invalid(Mesh, 'context', why)
    field = 'curriculum'


def count_of(run: Run) -> counts.Counts:
  """Returns the counts of the run's model.

  FLOPs per token are the mean over the run, weighted by tokens: the shorter rows of a curriculum cost less.
  """

  def count(cut: int) -> counts.Counts:
    lengths = {k: n // cut for k, n in run.train.lengths.items()}
    all_learn = counts.count(run.model, lengths)
    # The gradient of a matrix is a third of its FLOPs, and a matrix that does not learn has none.
    frozen = learning.frozen_names(counts.abstract(run.model), run.learns)
    if not frozen:
      return all_learn
    return counts.without_gradients(all_learn, run.model, frozen, lengths)

  whole = count(1)
  total = run.batches.examples(run.steps)
  flops = {k: v for k, v in vars(whole).items() if k.startswith('flops_')}
  for steps, size, cut in run.curriculum:
    if cut > 1:
      short = count(cut)
      share = steps * size / total
      flops = {k: v + share * (getattr(short, k) - getattr(whole, k)) for k, v in flops.items()}
  return dataclasses.replace(whole, **flops)
