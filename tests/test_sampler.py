"The sampler page in a real JupyterLab, used as a person does."
import pytest
from playwright.sync_api import expect

from jupyter_lab import keys_stay, no_cell_failed, opened, set_knob

pytestmark = pytest.mark.proof('apps.widget', 'apps.sampler')

pytest_plugins = 'jupyter_lab'

INJECTION = '<img src=x onerror="window.hacked = true">'

@pytest.fixture(scope='module')
def page(lab, browser):
    with opened(lab, browser, '20_sampler.ipynb', '.sampler-app .sampler-text') as page: yield page

def app(page): return page.locator('.sampler-app').last

def fill(page, where, text):
    field = app(page).locator(f'.{where} input')
    field.fill(text); field.press('Tab')

def test_a_sentence_is_written_call_by_call(page):
    assert 'untrained toy' in app(page).inner_text()
    set_knob(page, 'steps', 5)
    fill(page, 'sampler-text', 'the clever pilot said that the brave farmer hid the golden mirror')
    app(page).evaluate("""app => {
        window.rows = []
        const note = () => window.rows.push(app.querySelectorAll('.sampler-table tr').length)
        new MutationObserver(note).observe(app, {childList: true, subtree: true})
    }""")
    app(page).locator('button.sampler-write').click()
    expect(app(page).locator('.sampler-said')).to_contain_text('evaluations')
    page.wait_for_function('Math.max(...window.rows) >= 3')
    assert sorted(set(page.evaluate('window.rows')) - {0})[:2] == [1, 2] # one call after the other

def test_between_and_missing(page):
    app(page).locator('button.sampler-between').click()
    expect(app(page).locator('ol.sampler-between li')).to_have_count(7)
    app(page).locator('button.sampler-fill').click()
    expect(app(page).locator('.sampler-filled')).to_be_visible()

def test_markup_is_text_and_nothing_is_an_error(page):
    fill(page, 'sampler-text', INJECTION*8) # too long, and the message says so
    app(page).locator('button.sampler-write').click()
    expect(app(page).locator('.sampler-said')).to_contain_text('<img src=x')
    fill(page, 'sampler-text', '')
    app(page).locator('button.sampler-write').click()
    expect(app(page).locator('.sampler-said')).to_contain_text('a text must hold a word at least')
    assert page.evaluate('window.hacked') is None and no_cell_failed(page)

def test_keys_stay_in_the_app(page): keys_stay(page, '.sampler-said', 'button.sampler-write')
