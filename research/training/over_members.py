"""Applies one function to all members of a population. Every device has an equal share of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def goes_one_by_one() -> bool:
  """Returns whether a device computes its members one after the other.

  An accelerator is faster with all members at once. On a CPU one member is enough work: products of a batch of
  small matrices are slow there, and a single member fits into the cache.
  """
  return jax.devices()[0].platform == 'cpu'


def over_members(f: Callable) -> Callable:
  """Turns a function of one member into a function of all members that are active.

  Args:
    f: takes two dicts: the arguments of one member, and the arguments that all members share. If the member's
      arguments have the key 'state', the first result of f is the new state.

  Returns:
    A function of the members' arguments, [places, ...] with the boolean [places] 'active', and of the shared
    arguments. For a member that is not active the state stays as it was, and other results are zero.
  """
  f = jax.jit(f)  # traced once, for its shapes and for the loop

  def on_one_device(varying, shared):
    active = varying['active']

    def member(i, tree):
      return jax.tree.map(lambda x: x[i], tree)

    def zeros(x):
      return jnp.zeros((len(active), *x.shape), x.dtype)

    results = jax.tree.map(zeros, jax.eval_shape(f, member(0, varying), shared))
    if 'state' in varying:
      results = varying['state'], *results[1:]
    if not goes_one_by_one():
      return all_at_once(varying, shared, results)
    # Active members come first, so that the loop ends before the others.
    order = jnp.argsort(~active, stable=True)

    def update_member(i, results):
      # The state comes from `results`, which the loop updates in place: a second copy would need its memory.
      arguments = {**varying, 'state': results[0]} if 'state' in varying else varying
      new = f(member(order[i], arguments), shared)

      def put(all_members, x):
        return jax.lax.dynamic_update_index_in_dim(all_members, x, order[i], 0)

      return jax.tree.map(put, results, new)

    return jax.lax.fori_loop(0, jnp.sum(active), update_member, results)

  def all_at_once(varying, shared, results):
    def if_active(varying, results):
      return jax.lax.cond(varying['active'], lambda: f(varying, shared), lambda: results)

    return jax.vmap(if_active)(varying, results)

  on_one_device.__name__ = f.__name__  # in logs and profiles
  specs = (jax.P('member'), jax.P())
  return jax.shard_map(on_one_device, in_specs=specs, out_specs=jax.P('member'), check_vma=False)
