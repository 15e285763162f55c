"""The seeds of the noise that an embedder adds in training (`Embedder.noise`)."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.data.batches import NOISE, Batch
from research.parallel.axes import shard


def is_noisy(model: nnx.Module) -> bool:
  """Whether the embedder of a model adds noise."""
  return bool(getattr(getattr(model, 'embedder', None), 'noise', 0.0))


def with_seeds(batch: Batch, step: jax.Array) -> Batch:
  """The batch with a seed for every row, uint32 [rows, 2]: twice the step, and twice the number of the row.

  Twice, because the two sides of a pair differ in the lowest bit. A run that resumes has the same noise.
  """
  number = jnp.arange(len(batch['decoder_input_tokens']), dtype=jnp.uint32)
  seeds = jnp.stack([jnp.full_like(number, 2 * step.astype(jnp.uint32)), 2 * number], axis=1)
  return {**batch, NOISE: shard(seeds, 'batch', None)}


def without_seeds(batch: Batch) -> Batch:
  """The batch without them, as other models read it."""
  return {key: x for key, x in batch.items() if key != NOISE}
