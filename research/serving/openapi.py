"""The OpenAPI document of the endpoint, made from the bodies that it reads."""

import functools

from research.serving import bodies

WORK = {
  '/v1/chat/completions': (bodies.Chat, 'The next turn of a conversation.'),
  '/v1/completions': (bodies.Completion, 'The text that follows a prompt.'),
  '/v1/embeddings': (bodies.Embed, 'Where texts lie.'),
}
READ = {
  '/v1/models': 'The model that is served.',
  '/health': 'Whether the model works.',
  '/metrics': 'What was measured, for Prometheus.',
}
ERRORS = {
  '400': 'The request is wrong.', '401': 'The API key is missing or wrong.', '404': 'There is no such model.',
  '408': 'The body did not come.', '413': 'The body is too large.', '415': 'The body is not JSON.',
  '429': 'Too many requests wait.', '503': 'The model failed.', '504': 'The answer took too long.',
}  # fmt: skip


@functools.cache
def document(model: str) -> dict:
  """OpenAPI 3.1 of a server of this model."""
  definitions: dict = {'Error': ERROR}
  paths = {path: {'get': _operation(what)} for path, what in READ.items()}
  for path, (body, what) in WORK.items():
    schema = body.model_json_schema(ref_template='#/components/schemas/{model}')
    definitions |= schema.pop('$defs', {})
    schema['properties']['model'] = {'const': model, 'type': 'string'}
    definitions[body.__name__] = schema
    content = {'application/json': {'schema': _reference(body.__name__)}}
    paths[path] = {
      'post': {**_operation(what), 'requestBody': {'required': True, 'content': content}}
    }
  return {
    'openapi': '3.1.0',
    'info': {'title': 'Isoflop', 'version': '1', 'description': 'A trained model by the protocol of OpenAI.'},
    'paths': paths,
    'components': {
      'schemas': definitions,
      'securitySchemes': {'key': {'type': 'http', 'scheme': 'bearer'}},
    },
  }  # fmt: skip


ERROR = {
  'type': 'object',
  'required': ['error'],
  'properties': {
    'error': {
      'type': 'object',
      'required': ['message', 'type', 'param', 'code'],
      'properties': {
        'message': {'type': 'string'},
        'type': {'type': 'string'},
        'param': {'type': ['string', 'null']},
        'code': {'type': ['string', 'null']},
      },
    }
  },
}


def _reference(name: str) -> dict:
  return {'$ref': f'#/components/schemas/{name}'}


def _operation(what: str) -> dict:
  error = {'application/json': {'schema': _reference('Error')}}
  responses = {code: {'description': why, 'content': error} for code, why in ERRORS.items()}
  return {'summary': what, 'responses': {'200': {'description': what}, **responses}}
