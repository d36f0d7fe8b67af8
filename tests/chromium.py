"A headless Chromium by the protocol of its own driver, with nothing to install but the two."

import base64, json, shutil, socket, subprocess, time, urllib.request
from contextlib import contextmanager
from urllib.parse import urlparse

FLAGS = ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking')
PROGRAMS = {'chromedriver': shutil.which('chromedriver'), 'chromium': shutil.which('chromium')}
missing = ', '.join(name for name, found in PROGRAMS.items() if not found)
_KEY = 'element-6066-11e4-a52e-4f735466cecf'  # of an element, in the protocol


class Browser:
    "One window."

    def __init__(self, server, session):
        self.place = f'{server}/session/{session}'

    def call(self, path, method='POST', **given):
        return _call(f'{self.place}/{path}', method, given)

    def open(self, address):
        self.call('url', url=address)

    def run(self, script):
        "The value that a script returns."
        return self.call('execute/sync', script=script, args=[])

    def wait(self, script, seconds=90):
        "Until a script returns something true: that."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.run(f'return {script}'):
                return found
            time.sleep(0.2)
        raise TimeoutError(f'{script} is still false; the page says:\n{self.run("return document.body.innerText")}')

    def element(self, css):
        return self.call('element', using='css selector', value=css)[_KEY]

    def type(self, css, text):
        self.call(f'element/{self.element(css)}/value', text=text)

    def click(self, css):
        self.call(f'element/{self.element(css)}/click')

    def screenshot(self):
        "As PNG."
        return base64.b64decode(self.call('screenshot', 'GET'))

    def hosts(self):
        "Of all that was asked for since the last call."
        events = [json.loads(line['message'])['message'] for line in self.call('se/log', type='performance')]
        asked = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
        return {urlparse(url).hostname for url in asked if urlparse(url).scheme in ('http', 'https', 'ws', 'wss')}


def _call(address, method='POST', given=None):
    request = urllib.request.Request(
        address, json.dumps(given or {}).encode() if method == 'POST' else None, method=method
    )
    request.add_header('Content-Type', 'application/json')
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)['value']
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)['value']['message']) from error


@contextmanager
def browser(width=1400, height=950):
    "A window of a Chromium of its own, which ends with it."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = f'http://127.0.0.1:{port}'
    driver = subprocess.Popen([PROGRAMS['chromedriver'], f'--port={port}'], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                _call(f'{server}/status', 'GET')
                break
            except OSError:
                time.sleep(0.1)
        options = dict(args=[f'--{flag}' for flag in (*FLAGS, f'window-size={width},{height}')])
        wanted = {'goog:chromeOptions': options, 'goog:loggingPrefs': {'performance': 'ALL'}}
        made = _call(f'{server}/session', given={'capabilities': {'alwaysMatch': wanted}})
        try:
            yield Browser(server, made['sessionId'])
        finally:
            _call(f'{server}/session/{made["sessionId"]}', 'DELETE')
    finally:
        driver.terminate()
        driver.wait()
