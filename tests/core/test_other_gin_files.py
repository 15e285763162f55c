"""Gin files with what editors, copies and typing leave in them: read, or one sentence that names the place."""

import pathlib
import sys

import pytest

from research.core import configs
from research.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
CASES = ROOT.parent / 'shared' / 'cases' / '21-gin'
REFUSED = {
  'bad.gin': r'bad\.gin:2: importing mybad failed: .*mybad\.py:4',
  'imp.gin': r"imp\.gin:2: importing myimport failed: .*a_package_that_is_not_installed",
  'tab.gin': r'tab\.gin:2: importing mytab failed: .*mytab\.py:3',
  'latin1.gin': r'latin1\.gin:2: this file is not UTF-8 \(byte 0xe9\)',
  'utf16.gin': r'utf16\.gin: this file is UTF-16; save it as UTF-8',
  'macrocyc.gin': r'macrocyc\.gin:\d: .*is a circle',
  'macroself.gin': r'macroself\.gin:2: .*is a circle',
  'selfinc.gin': r'selfinc\.gin:1: this file includes itself',
}  # fmt: skip


@pytest.fixture
def cases(monkeypatch) -> pathlib.Path:
  """The folder of the files, from where a person would start the command."""
  if not CASES.is_dir():
    pytest.skip('the failing inputs are not beside the checkout')
  monkeypatch.chdir(CASES)
  monkeypatch.syspath_prepend(CASES)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)  # the folder stays as it is
  return CASES


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_wrong_with_a_gin_file_is_one_sentence_with_its_place(cases, name):
  with pytest.raises(UserError, match=REFUSED[name]) as error:
    configs.load(name).tree()
  assert '\n' not in str(error.value)


def test_a_byte_order_mark_is_passed_over(cases):
  assert configs.load('bom.gin').tree().keywords['steps'] == 500
