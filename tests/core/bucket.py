"""A bucket server for tests: the part of Cloud Storage's JSON API that TensorStore, gcsfs and Orbax use.

Objects are in memory. Writes honour generation preconditions, which leases need; `cat` and `names` look inside.
"""

import base64
import contextlib
import email
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
import uuid


class Bucket:
  """`with Bucket('name') as bucket:` serves it; `bucket.environment` is what a process needs to find it."""

  def __init__(self, name: str):
    self.name, self.objects, self.uploads, self.clock = name, {}, {}, 1000
    self.lock, self.read_only = threading.Lock(), False
    handler = type('Handler', (_Handler,), {'bucket': self})
    self.server = _Server(('127.0.0.1', 0), handler)
    url = f'http://127.0.0.1:{self.server.server_port}'
    self.environment = {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_CLOUD_PROJECT': 'test',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'test',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would ask Google itself, by gRPC
    }

  def __enter__(self):
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.server.shutdown()
    self.server.server_close()

  def cat(self, name: str) -> str:
    return self.objects[name][0].decode()

  def names(self, prefix: str = '') -> list[str]:
    with self.lock:
      return sorted(name for name in self.objects if name.startswith(prefix))

  def resource(self, name: str) -> dict:
    data, generation = self.objects[name]
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
    at = '2026-01-01T00:00:00.000Z'
    return {
      'kind': 'storage#object', 'id': f'{self.name}/{name}/{generation}', 'name': name, 'bucket': self.name,
      'generation': str(generation), 'metageneration': '1', 'size': str(len(data)), 'md5Hash': md5,
      'updated': at, 'timeCreated': at, 'contentType': 'application/octet-stream', 'storageClass': 'STANDARD',
    }  # fmt: skip

  def put(self, name: str, data: bytes, query: dict) -> tuple[int, dict]:
    with self.lock:
      if self.read_only:
        return 403, _error(403, 'test does not have storage.objects.create access')
      now = self.objects[name][1] if name in self.objects else 0
      if int(query.get('ifGenerationMatch', now)) != now:
        return 412, _error(412, 'conditionNotMet')
      self.clock += 1
      self.objects[name] = bytes(data), self.clock
      return 200, self.resource(name)

  def remove(self, name: str, query: dict) -> tuple[int, dict | None]:
    with self.lock:
      if name not in self.objects:
        return 404, _error(404, 'no such object')
      if int(query.get('ifGenerationMatch', self.objects[name][1])) != self.objects[name][1]:
        return 412, _error(412, 'conditionNotMet')
      del self.objects[name]
      return 204, None

  def list(self, query: dict) -> tuple[int, dict]:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], {}
    for name in self.names(prefix):
      if name < query.get('startOffset', '') or name >= query.get('endOffset', '\U0010ffff'):
        continue
      head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, '', '')
      if cut:
        prefixes[prefix + head + cut] = None
      else:
        items.append(self.resource(name))
    return 200, {'kind': 'storage#objects', 'items': items, 'prefixes': list(prefixes)}


def _error(code: int, message: str) -> dict:
  return {'error': {'code': code, 'message': message, 'errors': [{'message': message}]}}


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, *_): ...  # clients that were killed


class _Handler(http.server.BaseHTTPRequestHandler):
  bucket: Bucket
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_): ...

  def answer(self, code: int, body=None, headers=()):
    data = body if isinstance(body, bytes) else b'' if body is None else json.dumps(body).encode()
    with contextlib.suppress(ConnectionError):
      self.send_response(code)
      for key, value in dict(headers).items():
        self.send_header(key, value)
      kind = 'application/octet-stream' if isinstance(body, bytes) else 'application/json'
      self.send_header('Content-Type', kind)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(data)

  def serve(self):
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    if self.headers.get('Transfer-Encoding') == 'chunked':
      body = b''
      while size := int(self.rfile.readline().strip() or b'0', 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    match = re.fullmatch(
      r'(/upload|/download)?(?:/storage/v1)?/b/([^/]+)(?:/o(?:/(.+))?)?', url.path
    )
    if not match or match[2] != self.bucket.name:
      return self.answer(404, _error(404, 'The specified bucket does not exist.'))
    room, _, name = match.groups()
    if room == '/upload':
      return self.upload(query, body)
    if name is None:
      listing = url.path.endswith('/o')
      return self.answer(*self.bucket.list(query)) if listing else self.answer(
        200, {'kind': 'storage#bucket', 'name': self.bucket.name, 'id': self.bucket.name}
      )  # fmt: skip
    if '/rewriteTo/' in name:
      source, _, target = name.partition('/rewriteTo/')
      return self.copy(
        urllib.parse.unquote(source), urllib.parse.unquote(target.partition('/o/')[2])
      )
    name = urllib.parse.unquote(name)
    if self.command == 'DELETE':
      return self.answer(*self.bucket.remove(name, query))
    return self.read(name, query, media=room == '/download' or query.get('alt') == 'media')

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

  def read(self, name: str, query: dict, media: bool):
    with self.bucket.lock:
      if name not in self.bucket.objects:
        return self.answer(404, _error(404, 'no such object'))
      data, generation = self.bucket.objects[name]
      if not media:
        return self.answer(200, self.bucket.resource(name))
    headers = {'x-goog-generation': str(generation), 'x-goog-stored-content-length': str(len(data))}
    if query.get('ifGenerationNotMatch') == str(generation):
      return self.answer(304, None, headers)
    if wanted := re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range') or ''):
      first, last = wanted[1], wanted[2]
      start = int(first) if first else max(len(data) - int(last), 0)
      stop = min(int(last) + 1, len(data)) if first and last else len(data)
      if start >= len(data):
        return self.answer(416, _error(416, 'range'), headers)
      headers['Content-Range'] = f'bytes {start}-{stop - 1}/{len(data)}'
      return self.answer(206, data[start:stop], headers)
    return self.answer(200, data, headers)

  def copy(self, source: str, target: str):
    if source not in self.bucket.objects:
      return self.answer(404, _error(404, 'no such object'))
    code, made = self.bucket.put(target, self.bucket.objects[source][0], {})
    return self.answer(code, {'kind': 'storage#rewriteResponse', 'done': True, 'resource': made})

  def upload(self, query: dict, body: bytes):
    if query.get('uploadType') == 'media':
      return self.answer(*self.bucket.put(query['name'], body, query))
    if query.get('uploadType') == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
      return self.answer(*self.bucket.put(*_parts(head, body), query))
    if 'upload_id' not in query:
      token = uuid.uuid4().hex
      name = query.get('name') or json.loads(body)['name']
      self.bucket.uploads[token] = name, b''
      url = f'http://{self.headers["Host"]}{self.path}&upload_id={token}'
      return self.answer(200, {}, {'Location': url})
    name, data = self.bucket.uploads[query['upload_id']]
    self.bucket.uploads[query['upload_id']] = name, (data := data + body)
    if self.headers.get('Content-Range', '').endswith('/*'):  # more is to come
      return self.answer(308, None, {'Range': f'bytes=0-{len(data) - 1}'})
    return self.answer(*self.bucket.put(name, data, {}))


def _parts(head: bytes, body: bytes) -> tuple[str, bytes]:
  """(name, data) of a multipart upload."""
  boundary = email.message_from_bytes(head).get_param('boundary').encode()
  _, meta, data, *_ = body.split(b'--' + boundary)
  name = json.loads(re.split(rb'\r?\n\r?\n', meta, maxsplit=1)[1])['name']
  data = re.split(rb'\r?\n\r?\n', data, maxsplit=1)[1]
  return name, data[: -2 if data.endswith(b'\r\n') else -1]
