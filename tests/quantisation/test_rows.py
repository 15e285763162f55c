"""Rows of a text: evenly from the whole of it, each of which begins as a prompt does."""

from types import SimpleNamespace

import numpy as np

from research.quantisation import rows


def _codes(text: str) -> list[int]:
  return [ord(character) for character in text]


def test_fewer_rows_than_the_text_has_are_taken_evenly(tmp_path):
  file = tmp_path / 'text.txt'
  file.write_text(''.join(chr(40 + i) for i in range(41)))  # ten rows of four targets
  tokenizer = SimpleNamespace(encode=_codes)
  (batch,) = rows.of_text(str(file), tokenizer, 4, 5)
  kept = batch['decoder_loss_weights'].any(axis=1)
  np.testing.assert_array_equal(batch['decoder_input_tokens'][kept][:, 0], 40 + 8 * np.arange(5))
  targets = batch['decoder_target_tokens']
  np.testing.assert_array_equal(targets, batch['decoder_input_tokens'] + 1)
  (batch,) = rows.of_text(str(file), tokenizer, 4, None)
  assert batch['decoder_loss_weights'].any(axis=1).sum() == 10


def test_every_row_begins_with_the_token_that_prompts_begin_with(tmp_path):
  file = tmp_path / 'text.txt'
  file.write_text(''.join(chr(40 + i) for i in range(8)))
  tokenizer = SimpleNamespace(encode=_coded_after_bos)
  (batch,) = rows.of_text(str(file), tokenizer, 4, None)
  np.testing.assert_array_equal(
    batch['decoder_input_tokens'][:2], [[2, 40, 41, 42], [2, 44, 45, 46]]
  )
  targets = batch['decoder_target_tokens'][:2]
  np.testing.assert_array_equal(targets, [[40, 41, 42, 43], [44, 45, 46, 47]])


def _coded_after_bos(text: str) -> list[int]:
  return [2, *_codes(text)]
