"""The tokenizer of a Hugging Face folder as evaluation needs it, with the tokens that begin and end a text.

A run's tokenizer is made by `data.encoding`, which moves ids up where 0 is text. A converted model was trained
with the ids as they are.
"""

import json
import pathlib

from research.core.errors import UserError
from research.data.encoding import read_tokenizer
from research.inference import tokenizer


class FolderEncoding:
  """A folder's tokenizer.json, or its SentencePiece model.

  Attributes:
    begin: the id that the tokenizer puts in front of every text; None for none.
    start: the id in front of a text without a context: the beginning-of-text token, or else `end`.
    end: the end-of-text token. `ends` are all of them that the folder names.
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
      self._fast = read_tokenizer(file)
    else:
      self._fast = None
      self._in_front, self._behind = self._count_special()
    self.begin = self._begin_token()
    self.ends = self.with_special.ends
    end = self._special_id('eos_token')
    if end is None and not self.ends:
      end = self._special_id('sep_token')  # BERT's [SEP] stands behind every text
    if end is None and not self.ends:
      raise UserError(
        f'{folder}: neither config.json nor tokenizer_config.json names an end token.'
      )
    self.end = self.ends[0] if end is None else end
    candidates = [self._special_id('bos_token'), self.begin, self.end]
    self.start = next(token for token in candidates if token is not None)

  def encode(self, text: str) -> list[int]:
    """The ids of a text. Special tokens are among them only where the text spells them."""
    if self._fast:
      # `rows` puts special tokens in front where a row needs them.
      return self._fast.encode(text, add_special_tokens=False).ids
    ids = self.with_special.encode(text)
    return ids[self._in_front : len(ids) - self._behind]

  def decode(self, ids: list[int]) -> str:
    """The text of ids, without special tokens."""
    return self.with_special.decode(ids)

  @property
  def decoder_start(self) -> int | None:
    """The first id of an encoder-decoder's decoder, by config.json; None where it does not say."""
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

  def _special_id(self, name: str) -> int | None:
    """The id of a token that tokenizer_config.json names, such as 'eos_token'; None where it names none."""
    token = self._special.get(name)
    token = token.get('content') if isinstance(token, dict) else token
    return self._fast.token_to_id(token) if self._fast and isinstance(token, str) else None

  def _count_special(self) -> tuple[int, int]:
    """How many special tokens a SentencePiece model puts (in front of a text, behind it)."""
    special = self.with_special.encode('')
    # There is at most one, so that all stand on one side.
    in_front = self.with_special.encode('a')[: len(special)] == special
    return (len(special), 0) if in_front else (0, len(special))

  def _begin_token(self) -> int | None:
    plain = self.encode('a')
    whole = self.with_special.encode('a')
    in_front = len(whole) > len(plain) and whole[1 : 1 + len(plain)] == plain
    return whole[0] if in_front else None
