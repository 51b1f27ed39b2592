"""Smoke test of the running system: photo → prediction → metric → dashboard. Runs in the container of the API.

docker compose exec -T api python3 - < smoke.py       (with -e GRAFANA_PASSWORD=… it checks Grafana as well)
"""
import base64, json, os, socket, sys, time, urllib.parse, urllib.request
from urllib.error import HTTPError

health = dict(api='http://api:8000/health', mlflow='http://mlflow:5000/health', exporter='http://exporter:9400/metrics', prometheus='http://prometheus:9090/-/ready',
              alertmanager='http://alertmanager:9093/-/ready', app='http://app:7860/', dashboard='http://dashboard:8866/login',
              grafana='http://grafana:3000/api/health', airflow='http://airflow-api-server:8080/api/v2/monitor/health')
optional = 'airflow', 'app', 'grafana'

def ask(url, data=None, **headers):
    "What a server answers, as JSON where it is."
    request = urllib.request.Request(url, data, {k.replace('_', '-'): v for k, v in headers.items()})
    with urllib.request.urlopen(request, timeout=30) as f: body = f.read()
    try: return json.loads(body)
    except ValueError: return body

def value(query):
    "What Prometheus says; 0 where it knows nothing."
    found = ask('http://prometheus:9090/api/v1/query?' + urllib.parse.urlencode(dict(query=query)))['data']['result']
    return float(found[0]['value'][1]) if found else 0.

def synthetic_photo():
    "A drawn photo, as JPEG."
    from plant_mlops.data.synthetic import LABELS, draw_jpeg
    return draw_jpeg(LABELS[0], 0, 0)

def until(ok, seconds, what):
    "Wait for something that takes a scrape or two."
    end = time.monotonic() + seconds
    while not ok():
        if time.monotonic() > end: sys.exit(f'✗ {what}, {seconds} s later')
        time.sleep(1)

def there(name):
    "Whether a service is part of this system."
    try: return socket.gethostbyname(urllib.parse.urlsplit(health[name]).hostname)
    except OSError: return None

visit = [o for o in sys.argv[1:] or health if there(o) or o not in optional]
for name in set(health) - set(visit): print(f'– {name} is not part of this')
for name in visit:
    try: ask(health[name])
    except OSError as e: sys.exit(f'✗ {name} does not answer at {health[name]}: {e}')
    print(f'✓ {name} answers')

try: ask('http://api:8000/model/info')
except HTTPError as e: sys.exit(f'✗ There is no model yet ({e.code}). Make one: docker compose run --rm cli job run --all')
counted = 'sum(plant_predictions_total)'
before = value(counted)
answer = ask('http://api:8000/predict', synthetic_photo(), Content_Type='image/jpeg')
print(f"✓ the photo is {answer['prediction']}, {answer['probability']:.1%}, says version {answer['model_version']}")

token = os.environ['PLANT_TOKEN']
ask('http://api:8000/feedback', json.dumps(dict(id=answer['id'], label=answer['prediction'])).encode(), Authorization=f'Bearer {token}', Content_Type='application/json')
print('✓ feedback was taken')

until(lambda: value(counted) > before, 60, 'Prometheus has not counted the prediction')
print(f'✓ Prometheus has counted it: {value(counted):.0f} predictions')
until(lambda: value('plant_champion_info') == 1, 60, 'Prometheus does not know the model in production')
print('✓ Prometheus knows the model in production')

if 'dashboard' in visit:
    try: page = ask(f'http://dashboard:8866/?token={token}')
    except HTTPError as e: sys.exit(f'✗ the dashboard answers {e.code}')
    print(f'✓ the dashboard is there, {len(page):,} bytes')
if 'grafana' in visit and 'GRAFANA_PASSWORD' in os.environ:
    login = 'Basic ' + base64.b64encode(f"admin:{os.environ['GRAFANA_PASSWORD']}".encode()).decode()
    boards = [o['title'] for o in ask('http://grafana:3000/api/search?type=dash-db', Authorization=login)]
    print(f"✓ Grafana has {', '.join(boards)}") if boards else sys.exit('✗ Grafana has no dashboards')
