"""A draft for speculative decoding without a model: text that occurred before may come again."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Ngram:
  """Guesses the tokens that followed the last earlier occurrence of the newest `n` tokens.

  This is prompt look-up (Saxena 2023). It helps if an answer repeats parts of its prompt, as in editing and
  summaries.
  """

  n: int = 2

  def guess(self, text: jax.Array, newest: jax.Array, guesses: int) -> jax.Array:
    """Returns guesses [rows, guesses]. Where the newest tokens did not occur before, they are arbitrary tokens.

    Args:
      text: [rows, room], the tokens of each row from position 0 on.
      newest: [rows], the position of each row's newest token.
      guesses: how many tokens are guessed.
    """
    places = jnp.arange(text.shape[1])

    def guess_row(text, newest):
      same = (places >= self.n - 1) & (places < newest)
      for back in range(self.n):
        same &= jnp.roll(text, back) == text[newest - back]
      place = jnp.max(jnp.where(same, places, 0))
      return jax.lax.dynamic_slice_in_dim(text, place + 1, guesses)

    return jax.vmap(guess_row)(text, newest)
