"""Sequences that the mesh splits over devices: whether it does, and shifts across devices."""

import jax
import jax.numpy as jnp

from research.parallel.axes import axes_of, per_device, spec


def is_split(length: int) -> bool:
  """Returns whether the mesh in use splits sequences of this length over devices."""
  return spec('length', shape=(length,))[0] is not None


def delayed(x: jax.Array, steps: int) -> jax.Array:
  """Shifts x [batch, length, ...], whose length is split over devices, by `steps` tokens; zeros come first."""
  sharding = jax.P(*axes_of(x))
  devices = jax.sharding.get_abstract_mesh().shape[sharding[1]]
  # Tokens from beyond the device before: gather the whole length.
  if steps > x.shape[1] // devices:
    whole = jax.sharding.reshard(x, jax.P(sharding[0], None, *sharding[2:]))
    pad = jnp.pad(whole, ((0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)))
    return jax.sharding.reshard(pad[:, : x.shape[1]], sharding)

  def device(x):
    # No device sends to the first one, which then gets zeros.
    past = jax.lax.ppermute(x[:, -steps:], sharding[1], [(p, p + 1) for p in range(devices - 1)])
    return jnp.concatenate([past, x[:, :-steps]], axis=1)

  return per_device(device, in_specs=(sharding,), out_specs=sharding)(x)
