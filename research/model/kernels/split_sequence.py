"""Sequences that the mesh splits over devices: whether one is, and a token's neighbours across the seams."""

import jax
import jax.numpy as jnp

from research.parallel.axes import axes_of, per_device, spec


def is_split(length: int) -> bool:
  """Whether the mesh in use splits sequences of this length over devices."""
  return spec('length', shape=(length,))[0] is not None


def delayed(x: jax.Array, steps: int) -> jax.Array:
  """x[:, t - steps] at t, zeros at first, of [batch, length, ...] with its length split over devices."""
  where = jax.P(*axes_of(x))
  devices = jax.sharding.get_abstract_mesh().shape[where[1]]
  if steps > x.shape[1] // devices:
    whole = jax.sharding.reshard(x, jax.P(where[0], None, *where[2:]))
    pad = jnp.pad(whole, ((0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)))
    return jax.sharding.reshard(pad[:, : x.shape[1]], where)

  def device(x):
    # The first device is sent nothing, which is zeros.
    past = jax.lax.ppermute(x[:, -steps:], where[1], [(p, p + 1) for p in range(devices - 1)])
    return jnp.concatenate([past, x[:, :-steps]], axis=1)

  return per_device(device, in_specs=(where,), out_specs=where)(x)
