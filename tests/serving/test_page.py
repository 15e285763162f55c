"""The chat page in a real Chromium: a conversation by keyboard, streaming, stop, likely words, accessibility.

    uv run --group page pytest -n 0 -m slow tests/serving/test_page.py

The browser is the system's (Debian: apt-get install chromium). ISOFLOP_SCREENSHOTS names a folder for pictures.
"""

import os
import pathlib
import re
import shutil

import pytest

from tests.serving import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')
TEXT = 'The quick brown fox jumps over the lazy dog. '


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip('playwright.sync_api')
  if BROWSER is None:
    pytest.skip('no Chromium: apt-get install chromium')
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  def say(prompt):
    return TEXT * 40 if 'long' in prompt else TEXT

  folder = tmp_path_factory.mktemp('page')
  with tiny.serving(opened=lambda: tiny.scripted(folder, say, pause=0.005)) as url:
    yield url


@pytest.fixture(params=['light', 'dark'])
def page(request, browser, url):
  page = browser.new_page(color_scheme=request.param, viewport={'width': 900, 'height': 900})
  errors = []
  page.on('pageerror', lambda error: errors.append(str(error)))
  page.on('console', lambda m: errors.append(m.text) if is_fault(m) else None)
  page.goto(url)
  wait_for(page, '#model', 'tiny')
  page.scheme = request.param
  yield page
  page.close()
  assert errors == []


def is_fault(message) -> bool:
  """Whether the console tells of a fault; an answer that refuses a request is none."""
  return message.type == 'error' and 'Failed to load resource' not in message.text


def wait_for(page, element: str, text: str) -> None:
  """The page's own policy forbids to evaluate code in it, so that elements are waited for."""
  page.locator(element).filter(has_text=text).wait_for()


def picture(page, name: str) -> bytes:
  image = page.screenshot()
  if folder := os.environ.get('ISOFLOP_SCREENSHOTS'):
    (pathlib.Path(folder) / f'{name}-{page.scheme}.png').write_bytes(image)
  return image


def check_accessible(page) -> None:
  """No finding of axe-core, contrast included."""
  axe = pytest.importorskip('axe_playwright_python.sync_playwright')
  results = axe.Axe().run(page)
  assert results.violations_count == 0, results.generate_report()


def test_a_conversation_by_the_keyboard(page):
  check_accessible(page)
  page.keyboard.type('Hello')  # the field has the focus
  page.keyboard.press('Enter')
  answer = page.locator('.assistant .text').first
  page.locator('.token').nth(5).wait_for()
  assert answer.inner_text() != TEXT.strip()  # it is under way
  streaming = picture(page, 'streaming')
  wait_for(page, '#status', 'tokens,')
  assert answer.inner_text().strip() == TEXT.strip()
  done = picture(page, 'done')
  assert streaming != done
  # The page says what the model held likely, at a word that the arrows choose.
  answer.focus()
  page.keyboard.press('ArrowRight')
  page.keyboard.press('ArrowRight')
  assert re.search(r'90\.5%\s+"h"', page.locator('#nearly').inner_text())
  picture(page, 'nearly')
  page.keyboard.press('Escape')
  assert page.locator('#nearly').is_hidden()
  page.locator('.token').nth(3).hover()
  assert page.locator('#nearly').is_visible()
  page.mouse.move(0, 0)
  page.locator('summary').click()
  page.locator('#colours').check()
  picture(page, 'settings')
  check_accessible(page)


def test_escape_stops_a_long_answer_and_the_next_one_comes(page):
  page.keyboard.type('a long one')
  page.keyboard.press('Enter')
  page.locator('.token').nth(20).wait_for()
  page.keyboard.press('Escape')
  wait_for(page, '#status', 'Stopped')
  assert len(page.locator('.assistant .text').inner_text()) < len(TEXT * 40)
  page.keyboard.type('short')
  page.keyboard.press('Enter')
  page.locator('.assistant').nth(1).wait_for()
  wait_for(page, '#status', 'tokens,')


def test_a_wrong_setting_is_told(page):
  page.locator('summary').click()
  page.locator('#max_tokens').fill('100000')
  page.locator('#prompt').fill('Hello')
  page.locator('#send').click()
  wait_for(page, '#status', 'ask for fewer')
  assert 'error' in page.locator('#status').get_attribute('class')
  # The message is there to be sent again.
  assert page.locator('#prompt').input_value() == 'Hello'
  assert page.locator('article').count() == 0
