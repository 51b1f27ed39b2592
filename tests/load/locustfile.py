"""Visitors who send photos to a server, with pauses:

    locust -f tests/load/locustfile.py --headless -u 20 -r 5 -t 1m --host http://127.0.0.1:8000

Ends with 1 if more than --max-fail-ratio of the requests failed, or if the 99th percentile of the time to an answer is
above --max-p99. With --token, the PLANT_TOKEN of the server, some visitors also send feedback."""
from locust import FastHttpUser, events, task # first: it patches the modules that wait
import random
import gevent
from photos import SIZES, camera_photo, form

COUNTS = dict(thumbnail=16, web=4, phone=2) # photos of each size
photos = {name: [camera_photo(SIZES[name], seed) for seed in range(n)] for name, n in COUNTS.items()}
forms = {name: [form([photo]) for photo in items] for name, items in photos.items()}
batches = [form(photos['thumbnail'][i:i + 8], 'files') for i in (0, 8)]
broken = form([photos['thumbnail'][0][:5000]])
gevent.get_hub().loop.update_now() # drawing took seconds, which would count as time of the run

@events.init_command_line_parser.add_listener
def add_arguments(parser):
    "Limits, and how long visitors pause."
    parser.add_argument('--max-fail-ratio', type=float, default=.01, env_var='LOCUST_MAX_FAIL_RATIO',
                        help='Share of failed requests above which the run fails (default 0.01)')
    parser.add_argument('--max-p99', type=float, default=5000., env_var='LOCUST_MAX_P99',
                        help='99th percentile of the time to an answer in ms, above which the run fails (default 5000)')
    parser.add_argument('--think-time', type=float, default=1., env_var='LOCUST_THINK_TIME',
                        help='Mean pause of a visitor between two requests, in seconds (default 1)')
    parser.add_argument('--token', default='', env_var='PLANT_TOKEN', is_secret=True,
                        help='Token of the server, to send feedback; default: the variable PLANT_TOKEN')

@events.quitting.add_listener
def check_limits(environment, **kw):
    "Set the exit code of the run, and print why."
    total, options = environment.stats.total, environment.parsed_options
    p99 = total.get_response_time_percentile(.99) or 0
    passed = total.num_requests > 0 and total.fail_ratio <= options.max_fail_ratio and p99 <= options.max_p99
    environment.process_exit_code = 0 if passed else 1
    print(f'{"Passed" if passed else "Failed"}: {total.num_requests} requests, '
          f'{total.fail_ratio:.2%} failed (limit {options.max_fail_ratio:.2%}), '
          f'99th percentile {p99:.0f} ms (limit {options.max_p99:.0f} ms).')

class Visitor(FastHttpUser):
    "A visitor who sends a photo, looks at the answer, and sends another."
    network_timeout = connection_timeout = 60

    def wait_time(self): return self.environment.parsed_options.think_time * random.uniform(.5, 1.5)

    def send(self, name, body, path='/predict', status=200, key='prediction'):
        "Send a form. It is a success if the answer has the expected status and key; returns the answer, or None."
        data, content_type = body
        headers = {'Content-Type': content_type}
        with self.client.post(path, data=data, headers=headers, name=name, catch_response=True) as r:
            if r.status_code == status and key in r.json():
                r.success()
                return r.json()
            r.failure(f'{r.status_code} {(r.text or "")[:120]}')

    @task(10)
    def thumbnail(self):
        "A photo of 256 pixels; for one answer in five, feedback."
        token = self.environment.parsed_options.token
        answer = self.send('/predict 256 px', random.choice(forms['thumbnail']))
        if answer and token and random.random() < .2:
            truth = dict(id=answer['id'], label=answer['prediction'])
            self.client.post('/feedback', json=truth, headers={'Authorization': f'Bearer {token}'}, name='/feedback')

    @task(5)
    def web(self): self.send('/predict 2 MP', random.choice(forms['web']))

    @task(3)
    def phone(self): self.send('/predict 12 MP', random.choice(forms['phone']))

    @task(1)
    def batch(self): self.send('/predict/batch 8 × 256 px', random.choice(batches), '/predict/batch', key='results')

    @task(1)
    def broken_photo(self): self.send('/predict broken file', broken, status=422, key='detail')

    @task(2)
    def health(self): self.client.get('/health')

    @task(1)
    def info(self): self.client.get('/model/info')
