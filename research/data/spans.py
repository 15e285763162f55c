"""The lengths of span corruption: arithmetic that configurations and preprocessors share."""


def span_lengths(inputs: int, density: float, mean_span: float) -> tuple[int, int]:
  """The lengths of the text and of the targets of one span-corruption example.

  Raffel et al. (2020), arXiv:1910.10683, section 3.1.4: of n tokens, round(n density) are noise, in
  spans of mean length `mean_span`. Each span adds one sentinel to either side, and both sides end in EOS.

  Returns:
    (n, length of the targets) for the largest n whose inputs fit into `inputs` tokens.
  """

  def lengths(n):
    noise = round(n * density)
    spans = round(noise / mean_span)
    return n - noise + spans + 1, noise + spans + 1

  n = inputs - 1
  while lengths(n + 1)[0] <= inputs:
    n += 1
  used, targets = lengths(n)
  # t5's rule: at a density of one half the two sides are equally long.
  return (n - 1, targets - 1) if density == 0.5 and targets > used else (n, targets)


def encoder_share(lengths: dict[str, int], density: float, mean_span: float) -> int:
  """The longest inputs that fit with their targets into the `lengths['targets']` tokens of a decoder."""
  total = lengths['targets']
  inputs = total
  while inputs > 2 and inputs + span_lengths(inputs, density, mean_span)[1] > total:
    inputs -= 1
  return inputs
