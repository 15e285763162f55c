"""The tokenizer of a Hugging Face folder as evaluation needs it: its own ids, and what stands around a text.

A run's tokenizer is made by `data.encoding`, which moves ids up where 0 is text. A converted model was trained
with the ids as they are.
"""

import json
import pathlib

from research.core.errors import UserError
from research.inference import tokenizer


class FolderEncoding:
  """A folder's tokenizer.json, or its SentencePiece model.

  Attributes:
    begin: the id that the tokenizer puts in front of every text; None for none.
    start: the beginning-of-text token, or else the end-of-text one: what a text without a context begins with.
    end: the end-of-text token; `ends` are all that the folder names.
    size: one more than the highest id.
    template: the folder's chat template, a file for `data.conversations.template`; None for none.

  Raises:
    UserError: the folder has no tokenizer, or does not name its end-of-text token.
  """

  def __init__(self, folder: str | pathlib.Path):
    folder = pathlib.Path(folder)
    self.folder = folder
    self.with_special = tokenizer.of_folder(folder)
    self.size = self.with_special.size
    self._special = self._read_special()
    file = folder / 'tokenizer.json'
    if file.is_file():
      import tokenizers

      # Without special tokens of its own accord: they are put in front by whoever makes a row.
      fast = tokenizers.Tokenizer.from_file(str(file))
      self._encode = lambda text: fast.encode(text, add_special_tokens=False).ids
      self._id_of = fast.token_to_id
    else:
      self._encode, self._id_of = self._without_special(), lambda name: None
    self.begin = self._first()
    self.ends = self.with_special.ends
    end = self._named('eos_token')
    if end is None and not self.ends:
      raise UserError(
        f'{folder}: neither config.json nor tokenizer_config.json names an end token.'
      )
    self.end = self.ends[0] if end is None else end
    begin = self._named('bos_token')
    self.start = begin if begin is not None else self.begin if self.begin is not None else self.end

  def encode(self, text: str) -> list[int]:
    """The ids of a text; special tokens only where the text spells them."""
    return self._encode(text)

  def decode(self, ids: list[int]) -> str:
    return self.with_special.decode(ids)

  @property
  def decoder_start(self) -> int | None:
    """What the decoder of an encoder-decoder starts from, as config.json says; None where it says nothing."""
    return next(iter(self.with_special.start), None)

  @property
  def template(self) -> str | None:
    path = self.folder / 'chat_template.jinja'
    if path.is_file():
      return str(path)
    has_one = self._special.get('chat_template')
    return str(self.folder / 'tokenizer_config.json') if has_one else None

  def _read_special(self) -> dict:
    path = self.folder / 'tokenizer_config.json'
    if not path.is_file():
      return {}
    try:
      settings = json.loads(path.read_text())
    except ValueError as error:
      raise UserError(f'{path} is not JSON ({error}).') from error
    return settings if isinstance(settings, dict) else {}

  def _named(self, name: str) -> int | None:
    """The id of a token that tokenizer_config.json names."""
    token = self._special.get(name)
    token = token.get('content') if isinstance(token, dict) else token
    return self._id_of(token) if isinstance(token, str) else None

  def _without_special(self):
    whole = self.with_special.encode
    empty = whole('')
    # SentencePiece here has at most one special token, in front or behind.
    front = len(empty) if whole('a')[: len(empty)] == empty else 0
    return lambda text: whole(text)[front : len(whole(text)) - (len(empty) - front)]

  def _first(self) -> int | None:
    own, whole = self._encode('a'), self.with_special.encode('a')
    return whole[0] if len(whole) > len(own) and whole[1 : 1 + len(own)] == own else None
