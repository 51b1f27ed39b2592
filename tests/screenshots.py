"""Take the pictures of the documentation anew, from a system that is really used: `make screenshots`. It needs Chromium, and ten minutes."""
import io, json, os, shutil, subprocess, sys, tempfile
from contextlib import contextmanager
from pathlib import Path
import httpx
from PIL import Image
from playwright.sync_api import sync_playwright
from conftest import free_port, root, stop, wait_for
from plant_mlops.data.synthetic import LABELS, photo

token = 'for-these-pictures'

def plant(home, *args):
    "Run a command; what it printed."
    return subprocess.run([sys.executable, '-m', 'plant_mlops', *args, '--home', home], check=True, capture_output=True, text=True, cwd=home).stdout

@contextmanager
def server(home, command, url):
    "A server of a home, while the block runs."
    p = subprocess.Popen([sys.executable, '-m', 'plant_mlops', *command, '--home', str(home)], cwd=home, env=os.environ | dict(PLANT_TOKEN=token), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: httpx.get(url).status_code == 200, 120, command[0])
        yield
    finally: stop(p)

def use(api, n=240):
    "Ask for predictions, and say of some what they really were."
    for i in range(n):
        label = LABELS[i % 2]
        r = httpx.post(f'{api}/predict', content=photo(label, 1000 + i, i), headers={'Content-Type': 'image/jpeg'}, timeout=60).json()
        if i % 4 == 0: httpx.post(f'{api}/feedback', json=dict(id=r['id'], label=label), headers={'Authorization': f'Bearer {token}'})

def save(png, path, box=None):
    "A picture as JPEG, or a part of it: (left, upper, right, lower), in pixels."
    img = Image.open(io.BytesIO(png)).convert('RGB')
    (img.crop([min(o, m) for o, m in zip(box, (*img.size, *img.size))]) if box else img).save(root/'nbs'/path, quality=82, optimize=True)
    print(f'nbs/{path}')

def show_page(browser, api, home):
    "The page, with an answer."
    (file := home/'a-photo.jpg').write_bytes(photo(LABELS[0], 7, 7))
    p = browser.new_page(viewport=dict(width=1020, height=1010))
    p.goto(f'{api}/ui/')
    p.wait_for_selector('.pm-head h1')
    p.set_input_files('.pm-photo input[type=file]', str(file))
    p.wait_for_selector('.pm-card h2')
    p.wait_for_timeout(2000)
    save(p.screenshot(), 'serve/app.jpg')

def show_dashboard(browser, url):
    "Its first sections, mistakes and traffic."
    p = browser.new_page(viewport=dict(width=1180, height=8000)) # so that nothing has to be scrolled
    p.goto(url)
    p.wait_for_function(r"/\d:\d\d/.test(document.querySelector('.pm-said')?.innerText)", timeout=120_000)
    p.locator('button:has-text("Hour")').click()
    p.wait_for_timeout(4000)
    p.add_style_tag(content='.pm-bar { position: static !important }')
    top = {}
    for o in p.locator('h2').all(): top.setdefault(o.inner_text().replace('¶', '').strip(), max(0, int(o.bounding_box()['y']) - 20))
    png = p.screenshot()
    for name, since, until in (('top', None, 'Models'), ('mistakes', 'Mistakes', 'Traffic'), ('traffic', 'Traffic', 'Drift')):
        save(png, f'apps/dashboard-{name}.jpg', (0, top[since] if since else 0, 1180, top[until] if since else 1500))

def show_report(browser, home):
    "What papermill left of a training."
    row = json.loads(plant(home, 'job', 'show', 'train', '--json'))
    p = browser.new_page(viewport=dict(width=750, height=1215))
    p.goto((home/'store'/row['report'].replace('.ipynb', '.html')).as_uri())
    p.wait_for_timeout(1000)
    top = int(p.locator('h2:has-text("Training")').bounding_box()['y']) - 20 # from where the pictures are
    save(p.screenshot(full_page=True), 'ops/report.jpg', (0, top, 750, top + 1215))

def main():
    home = Path(tempfile.mkdtemp(prefix='plant-pictures-'))
    api, board = (f'http://127.0.0.1:{free_port()}' for _ in range(2))
    try:
        plant(home, 'job', 'run', '--all')
        with sync_playwright() as w:
            chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
            browser = w.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking'])
            with server(home, ['serve', '--port', api.rpartition(':')[2]], f'{api}/ready'):
                use(api)
                show_page(browser, api, home)
                plant(home, 'drift')
            with server(home, ['dashboard', '--port', board.rpartition(':')[2]], board): show_dashboard(browser, board)
            show_report(browser, home)
            browser.close()
    finally: shutil.rmtree(home)

if __name__ == '__main__': main()
