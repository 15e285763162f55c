"""The OpenAPI document of the endpoint, made from the bodies that it accepts."""

import functools

from research.serving import bodies

POST = {
  '/v1/chat/completions': (bodies.Chat, 'The next turn of a conversation.'),
  '/v1/completions': (bodies.Completion, 'The text that follows a prompt.'),
  '/v1/embeddings': (bodies.Embed, 'Vectors that represent texts.'),
}
GET = {
  '/v1/models': 'The model that is served.',
  '/health': 'Whether the model works.',
  '/metrics': 'Measurements for Prometheus.',
}
ERRORS = {
  '400': 'The request is wrong.', '401': 'The API key is missing or wrong.', '404': 'There is no such model.',
  '408': 'The body did not come.', '413': 'The body is too large.', '415': 'The body is not JSON.',
  '429': 'Too many requests wait.', '503': 'The model failed.', '504': 'The answer took too long.',
}  # fmt: skip


@functools.cache
def document(model: str) -> dict:
  """Returns OpenAPI 3.1 of a server of the model of this name."""
  definitions: dict = {'Error': ERROR}
  paths = {path: {'get': _operation(summary)} for path, summary in GET.items()}
  for path, (body, summary) in POST.items():
    schema = body.model_json_schema(ref_template='#/components/schemas/{model}')
    definitions |= schema.pop('$defs', {})
    # With the one valid name, generated requests get past the check of the model.
    schema['properties']['model'] = {'const': model, 'type': 'string'}
    definitions[body.__name__] = schema
    content = {'application/json': {'schema': _reference(body.__name__)}}
    paths[path] = {
      'post': {**_operation(summary), 'requestBody': {'required': True, 'content': content}}
    }
  return {
    'openapi': '3.1.0',
    'info': {
      'title': 'Isoflop', 'version': '1', 'description': "A trained model behind OpenAI's protocol.",
    },
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


def _operation(summary: str) -> dict:
  error = {'application/json': {'schema': _reference('Error')}}
  responses = {code: {'description': why, 'content': error} for code, why in ERRORS.items()}
  return {'summary': summary, 'responses': {'200': {'description': summary}, **responses}}
