"""People who send photos to a server, with pauses: locust -f tests/load/locustfile.py --headless -u 20 -r 5 -t 1m --host http://127.0.0.1:8000

Ends with 1 if more than --max-fail-ratio of the requests failed, or the slowest hundredth took longer than --max-p99.
With --token, the PLANT_TOKEN of the server, some of them also say what a photo really was."""
from locust import FastHttpUser, events, task # first: it patches the modules that wait
import gevent, random
from photos import SIZES, camera_photo, form

photos = {k: [camera_photo(size, seed) for seed in range(n)] for (k, size), n in zip(SIZES.items(), (16, 4, 2))}
forms = {k: [form([o]) for o in v] for k, v in photos.items()}
batches = [form(photos['thumbnail'][i:i + 8], 'files') for i in (0, 8)]
broken = form([photos['thumbnail'][0][:5000]])
gevent.get_hub().loop.update_now() # drawing took seconds, which would count as time of the run

@events.init_command_line_parser.add_listener
def add_arguments(parser):
    "Limits, and how busy people are."
    def add(name, default, what, **kw): parser.add_argument(f'--{name}', type=type(default), default=default, help=what, **kw)
    add('max-fail-ratio', .01, 'Share of failed requests above which the run fails (default 0.01)', env_var='LOCUST_MAX_FAIL_RATIO')
    add('max-p99', 5000., '99th percentile of the time to an answer, in ms, above which the run fails (default 5000)', env_var='LOCUST_MAX_P99')
    add('think-time', 1., 'Mean pause of a person between two requests, in seconds (default 1)', env_var='LOCUST_THINK_TIME')
    add('token', '', 'Token of the server, to send feedback; default: the variable PLANT_TOKEN', env_var='PLANT_TOKEN', is_secret=True)

@events.quitting.add_listener
def judge(environment, **kw):
    "The exit code of the run."
    total, o = environment.stats.total, environment.parsed_options
    p99 = total.get_response_time_percentile(.99) or 0
    good = total.num_requests > 0 and total.fail_ratio <= o.max_fail_ratio and p99 <= o.max_p99
    environment.process_exit_code = int(not good)
    print(f'{"Passed" if good else "Failed"}: {total.num_requests} requests, {total.fail_ratio:.2%} failed (limit {o.max_fail_ratio:.2%}), '
          f'99th percentile {p99:.0f} ms (limit {o.max_p99:.0f} ms).')

class Visitor(FastHttpUser):
    "Somebody who sends a photo, looks at the answer, and sends another."
    network_timeout = connection_timeout = 60

    def wait_time(self): return self.environment.parsed_options.think_time * random.uniform(.5, 1.5)

    def send(self, name, body, path='/predict', status=200, key='prediction'):
        "Send a form; its answer counts as a success if it has the status and the key that it should. Gives the answer, or None."
        data, kind = body
        with self.client.post(path, data=data, headers={'Content-Type': kind}, name=name, catch_response=True) as r:
            if r.status_code == status and key in r.json():
                r.success()
                return r.json()
            r.failure(f'{r.status_code} {(r.text or "")[:120]}')

    @task(10)
    def thumbnail(self):
        "A photo of 256 pixels; one answer in five is told what it really was."
        answer, token = self.send('/predict 256 px', random.choice(forms['thumbnail'])), self.environment.parsed_options.token
        if answer and token and random.random() < .2:
            self.client.post('/feedback', json=dict(id=answer['id'], label=answer['prediction']), headers={'Authorization': f'Bearer {token}'}, name='/feedback')

    @task(5)
    def web(self): self.send('/predict 2 MP', random.choice(forms['web']))

    @task(3)
    def phone(self): self.send('/predict 12 MP', random.choice(forms['phone']))

    @task(1)
    def batch(self): self.send('/predict/batch 8 × 256 px', random.choice(batches), '/predict/batch', key='results')

    @task(1)
    def broken(self): self.send('/predict broken file', broken, status=422, key='detail')

    @task(2)
    def health(self): self.client.get('/health')

    @task(1)
    def info(self): self.client.get('/model/info')
