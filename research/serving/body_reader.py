"""Reads the bodies of requests, within bounds of type, size and time."""

import asyncio

import pydantic
from starlette.requests import Request

from research.serving import api_errors, bodies
from research.serving.api_errors import ApiError

# Many clients read no response before they have sent the whole body. So a body that is too large is read to its
# end and dropped, up to this many bytes.
MOST_DROPPED = 2**28


async def read_body(
  request: Request, kind: type[bodies.Request], largest: int, timeout: float
) -> bodies.Request:
  """Returns the checked body of a request.

  Args:
    request: the HTTP request.
    kind: the class of the body.
    largest: the most bytes of a body.
    timeout: the most seconds until the body is complete.

  Raises:
    ApiError: the body is not valid, too large or too slow.
  """
  content_type = request.headers.get('content-type', '').partition(';')[0].strip().lower()
  # A web page can send other types to this machine without asking the browser (CORS), but not JSON.
  if content_type != 'application/json':
    raise ApiError('Content-Type must be application/json.', status=415)
  if request.headers.get('content-encoding', 'identity').strip().lower() != 'identity':
    raise ApiError('a body must not be compressed: leave Content-Encoding out.', status=415)
  try:
    async with asyncio.timeout(timeout):
      data = await _read(request, largest)
  except TimeoutError:
    message = f'the body did not come within {timeout:g} s.'
    raise ApiError(message, status=408, code='timeout') from None
  try:
    return kind.model_validate_json(data)
  except pydantic.ValidationError as error:
    fields = [field.alias or name for name, field in kind.model_fields.items()]
    raise api_errors.of_validation(error, fields) from None


async def _read(request: Request, largest: int) -> bytes:
  data = bytearray()
  length = 0
  async for part in request.stream():
    length += len(part)
    if length <= largest:
      data += part
    elif length > MOST_DROPPED:
      break
  if length > largest:
    message = f'the body is larger than {largest:,} bytes, the most that this server reads.'
    raise ApiError(message, status=413, code='body_too_large')
  return bytes(data)
