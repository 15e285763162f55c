"""Checks that an engine can answer a request, before anything is computed."""

from flax import nnx

from research.core.errors import Invalid
from research.inference.request import Request
from research.inference.sampling import Sampling


def check_request(
  request: Request, vocab: int, room: int, encoder_room: int, has_tokenizer: bool
) -> None:
  """Raises Invalid if an engine of these sizes cannot answer a request."""
  for name, tokens in (('prompt', request.prompt), ('encoder', request.encoder)):
    wrong = [t for t in tokens if not 0 <= t < vocab]
    if wrong:
      why = f'the model has no token {wrong[0]}: its ids are 0 to {vocab - 1}.'
      raise Invalid(Request, name, why)
  unknown = [t for t in request.sampling.logit_bias if not 0 <= t < vocab]
  if unknown:
    raise Invalid(Sampling, 'logit_bias', f'the model has no token {unknown[0]}.')
  if request.top > vocab:
    raise Invalid(Request, 'top', f'{request.top} is more than the {vocab} tokens of the model.')
  if len(request.prompt) + request.max_tokens > room:
    raise Invalid(
      Request,
      'prompt',
      f'{len(request.prompt)} tokens and up to {request.max_tokens} more do not fit into a room of '
      f'{room}; shorten the prompt, ask for fewer tokens, or raise the room.',
    )
  if len(request.encoder) > encoder_room:
    why = f'{len(request.encoder)} tokens do not fit into an encoder_room of {encoder_room}.'
    raise Invalid(Request, 'encoder', why)
  if encoder_room and not request.encoder:
    raise Invalid(Request, 'encoder', 'it is empty, and the encoder needs something to read.')
  if request.stop and not has_tokenizer:
    raise Invalid(Request, 'stop', 'strings need an engine with a tokenizer; use stop_tokens.')


def check_model(owner: type, model: nnx.Module, room: int, encoder_room: int) -> None:
  """Raises Invalid, naming a field of `owner`, if a model and these sizes do not fit together."""
  if ('encoder' in model.inputs) != bool(encoder_room):
    why = 'an encoder-decoder needs it.' if 'encoder' in model.inputs else 'this is a decoder.'
    raise Invalid(owner, 'encoder_room', f'{encoder_room}: {why}')
  most = positions_of(model)
  if most is not None and room > most:
    why = f'{room} is more than the {most} positions that the model has learned; lower it.'
    raise Invalid(owner, 'room', why)


def positions_of(model: nnx.Module) -> int | None:
  """Returns how many positions a model has learned; None for a model whose positions have no end."""
  learned = getattr(model.embedder, 'positions', None)
  return None if learned is None else learned.shape[0] - model.embedder.position_offset
