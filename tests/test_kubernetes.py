"The Kubernetes manifests, as far as they can be judged without a cluster."
import json, os, re, shutil, subprocess, sys
from functools import cache
from pathlib import Path
import pytest, yaml
from helpers import missing, require, root
from plant_mlops.core.config import Settings, settings
from plant_mlops.jobs.table import job_table
from plant_mlops.targets.kubernetes import cronjob, cronjobs, prometheus_rule

jobs = job_table(settings()).jobs
k8s = root/'kubernetes'
overlays = ['overlays/local', 'overlays/production']
all_of_it = [*overlays, 'train-gpu']
each = pytest.mark.parametrize('what', all_of_it)

def render(folder) -> str:
    "What `kubectl apply -k` would apply; a test that renders is skipped where there is no kubectl, others are not."
    r = subprocess.run([require('kubectl'), 'kustomize', str(folder)], capture_output=True, text=True)
    assert not r.returncode, r.stderr
    assert not r.stderr, r.stderr # kustomize warns of what is deprecated
    return r.stdout

@cache
def text(what): return render(k8s/what)

@cache
def found(what): return [o for o in yaml.safe_load_all(text(what)) if o]

def kinds(what, *kind): return [o for o in found(what) if o['kind'] in kind]

def named(what, kind, name): return next(o for o in kinds(what, kind) if o['metadata']['name'] == name)

def template(o):
    "The pod of a resource; None where it makes none."
    spec = o.get('spec', {})
    return spec['jobTemplate']['spec']['template'] if o['kind'] == 'CronJob' else spec.get('template')

def pods(what): return [(f"{o['kind']} {o['metadata']['name']}", template(o)) for o in found(what) if template(o)]

def containers(pod): return pod['spec']['containers'] + pod['spec'].get('initContainers', [])

def selects(selector, labels) -> bool:
    "Whether a label selector matches."
    ops = dict(In=lambda v, k: v in k['values'], NotIn=lambda v, k: v not in k['values'], Exists=lambda v, k: v is not None, DoesNotExist=lambda v, k: v is None)
    return (all(labels.get(k) == v for k, v in selector.get('matchLabels', {}).items())
            and all(ops[o['operator']](labels.get(o['key']), o) for o in selector.get('matchExpressions', [])))

def chosen(what, selector): return [p for _, p in pods(what) if selects(selector, p['metadata']['labels'])]

def in_bytes(q): return int(re.match(r'\d+', q)[0]) * {'Mi': 2**20, 'Gi': 2**30}[q[-2:]]

@each
def test_it_renders_without_secrets_into_one_namespace(what):
    assert found(what) and not kinds(what, 'Secret')
    for o in found(what): assert o['kind'] == 'Namespace' or o['metadata'].get('namespace') == 'plant-mlops', o['metadata']
    ids = [(o['kind'], o['metadata']['name']) for o in found(what)]
    assert len(ids) == len(set(ids))

@pytest.mark.parametrize('version', [f'1.{o}' for o in range(31, 38)])
def test_kubernetes_knows_every_field(version, monkeypatch):
    require('kubernetes-validate')
    from kubernetes_validate import utils
    assert version in map(utils.major_minor, utils.all_versions()) # otherwise an older one would be taken
    monkeypatch.setattr(utils, 'schema_contents', cache(utils.schema_contents)) # it reads a megabyte for each resource
    for o in [o for what in all_of_it for o in found(what)]:
        try: utils.validate(o, version, strict=True)
        except utils.ValidationError as e: pytest.fail(f"{o['kind']} {o['metadata']['name']}: {'.'.join(map(str, e.path))}: {e.message}")

@each
def test_pods_are_restricted(what):
    for name, pod in pods(what):
        s = pod['spec']
        assert s['automountServiceAccountToken'] is False and s['serviceAccountName'] != 'default', name
        assert not any(s.get(k) for k in ('hostNetwork', 'hostPID', 'hostIPC')), name
        about = s['securityContext']
        assert about['runAsNonRoot'] is True and about['runAsUser'] == about['runAsGroup'] == about['fsGroup'] == 10001, name
        assert about['seccompProfile'] == {'type': 'RuntimeDefault'}, name
        assert all({*v} - {'name'} <= {'emptyDir', 'persistentVolumeClaim', 'configMap'} for v in s.get('volumes', [])), name
        for c in containers(pod):
            mine = c['securityContext']
            assert mine['allowPrivilegeEscalation'] is False and mine['readOnlyRootFilesystem'] is True and mine['capabilities'] == {'drop': ['ALL']}, name
            assert not mine.get('privileged') and mine.get('runAsUser', 10001) == 10001, name
            assert {'cpu', 'memory'} <= {*c['resources']['requests']} & {*c['resources']['limits']}, name
            assert in_bytes(c['resources']['requests']['memory']) <= in_bytes(c['resources']['limits']['memory']), name
            assert {'/tmp', '/data'} <= {m['mountPath'] for m in c['volumeMounts']}, name
            assert re.search(r':[\w.-]+(@sha256:[0-9a-f]{64})?$', c['image']) and not c['image'].endswith(':latest'), c['image']

@each
def test_what_is_referred_to_exists(what):
    here = found(what) if what in overlays else found(what) + found('overlays/production')
    have = {k: {o['metadata']['name'] for o in here if o['kind'] == k} for k in ('ConfigMap', 'ServiceAccount')}
    keys = {o.split('=')[0] for o in (k8s/'secret.env.example').read_text().splitlines() if '=' in o} | ({'POSTGRES_PASSWORD'} if what == 'overlays/local' else set())
    for name, pod in pods(what):
        assert pod['spec']['serviceAccountName'] in have['ServiceAccount'], name
        volumes = {v['name'] for v in pod['spec'].get('volumes', [])} | ({'data'} if name.startswith('StatefulSet') else set())
        for c in containers(pod):
            assert {m['name'] for m in c['volumeMounts']} <= volumes, name
            for o in c.get('envFrom', []):
                assert o.get('configMapRef', {}).get('name') in {*have['ConfigMap'], None} and o.get('secretRef', {}).get('name') in {'plant-mlops', None}, name
            for o in c.get('env', []):
                if 'secretKeyRef' not in (v := o.get('valueFrom', {})): continue
                assert v['secretKeyRef']['name'] == 'plant-mlops' and v['secretKeyRef']['key'] in keys, (name, o)
    for o in kinds(what, 'RoleBinding'): assert o['roleRef']['name'] in {r['metadata']['name'] for r in kinds(what, 'Role')}

@each
def test_every_variable_is_a_setting(what):
    known = {f'PLANT_{k.upper()}' for k in Settings.model_fields}
    names = [k for o in kinds(what, 'ConfigMap') for k in o['data']] + [o['name'] for _, p in pods(what) for c in containers(p) for o in c.get('env', [])]
    assert {o for o in names if o.startswith('PLANT_')} <= known

@pytest.mark.parametrize('what', overlays)
def test_selectors_and_targets_lead_somewhere(what):
    labels = lambda o: {'matchLabels': o}
    for o in kinds(what, 'Deployment', 'StatefulSet'): assert selects(o['spec']['selector'], template(o)['metadata']['labels']), o['metadata']
    for o in kinds(what, 'PodDisruptionBudget'): assert chosen(what, o['spec']['selector']), o['metadata']
    for o in kinds(what, 'HorizontalPodAutoscaler'): assert 'replicas' not in named(what, o['spec']['scaleTargetRef']['kind'], o['spec']['scaleTargetRef']['name'])['spec']
    ports = lambda p: {o['name'] for c in containers(p) for o in c.get('ports', [])}
    for o in kinds(what, 'Service'):
        assert (to := chosen(what, labels(o['spec']['selector']))), o['metadata']
        for p in o['spec']['ports']: assert all(p['targetPort'] in ports(t) for t in to), o['metadata']
    for o in kinds(what, 'Ingress'):
        for path in [p for r in o['spec']['rules'] for p in r['http']['paths']]:
            to = path['backend']['service']
            assert to['port']['name'] in {p['name'] for p in named(what, 'Service', to['name'])['spec']['ports']}
    for name, p in pods(what):
        for c in containers(p):
            for probe in [c[k] for k in ('startupProbe', 'livenessProbe', 'readinessProbe') if k in c]:
                if 'exec' not in probe: assert (probe.get('httpGet') or probe['tcpSocket'])['port'] in ports(p), name

@pytest.mark.parametrize('what', overlays)
def test_the_network_is_closed_but_for_what_is_needed(what):
    policies = {o['metadata']['name']: o['spec'] for o in kinds(what, 'NetworkPolicy')}
    assert policies['default-deny'] == dict(podSelector={}, policyTypes=['Ingress', 'Egress'])
    for name, o in policies.items():
        assert chosen(what, o['podSelector']), f'{name} is for no pod'
        rules = [(k, r) for k, side in (('ingress', 'from'), ('egress', 'to')) for r in o.get(k, [])]
        assert name == 'default-deny' or rules and all(r.get('ports') and (r.get('from') or r.get('to')) for _, r in rules), name
        for side, r in rules:
            for peer in r.get('from', []) + r.get('to', []):
                if 'podSelector' in peer and 'namespaceSelector' not in peer: assert chosen(what, peer['podSelector']), f'{name} lets in or out what is not there'
            for p in r['ports']:
                assert isinstance(p['port'], int) or all(p['port'] in {o['name'] for c in containers(t) for o in c['ports']} for t in chosen(what, o['podSelector'])), name
    for block in [p['ipBlock'] for o in policies.values() for r in o.get('egress', []) for p in r['to'] if 'ipBlock' in p]:
        if block['cidr'] == '0.0.0.0/0': assert {'169.254.0.0/16', '10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16'} <= {*block['except']}
        if block['cidr'] == '::/0': assert {'fc00::/7', 'fe80::/10'} <= {*block['except']}
    [(_, gpu)] = pods('train-gpu')
    assert selects(policies['to-services']['podSelector'], gpu['metadata']['labels'])
    out = [k for k, o in policies.items() if any(b.get('ipBlock', {}).get('cidr', '').endswith('/0') for r in o.get('egress', []) for b in r['to'])]
    assert out == ['ingest-to-internet'] and [p['metadata']['labels'].get('plant-mlops/job') for p in chosen(what, policies[out[0]]['podSelector'])] == ['ingest']

def test_the_cronjobs_are_the_job_table():
    assert (k8s/'base/cronjobs.yaml').read_text() == cronjobs(settings()), 'run `make export`'

def test_the_overlays_keep_what_the_job_table_says():
    for what in overlays:
        crons = {o['metadata']['name']: o['spec'] for o in kinds(what, 'CronJob')}
        assert crons.keys() == jobs.keys()
        for k, o in crons.items():
            made, run = cronjob(settings(), jobs[k], '')['spec'], o['jobTemplate']['spec']
            assert {x: o[x] for x in made if x != 'jobTemplate'} == {x: made[x] for x in made if x != 'jobTemplate'}, k
            assert {x: run[x] for x in ('backoffLimit', 'activeDeadlineSeconds')} == {x: made['jobTemplate']['spec'][x] for x in ('backoffLimit', 'activeDeadlineSeconds')}, k
            assert [c['args'] for c in containers(run['template'])] == [c['args'] for c in containers(made['jobTemplate']['spec']['template'])], k
    gpu = named('train-gpu', 'Job', 'train-gpu')['spec']
    assert gpu['activeDeadlineSeconds'] == jobs['train'].timeout + 180 and containers(gpu['template'])[0]['args'] == ['job', 'run', 'train']

def test_the_api_has_its_numbers():
    api = containers(template(named('overlays/production', 'Deployment', 'api')))[0]
    assert api['resources'] == dict(requests=dict(cpu='100m', memory='128Mi'), limits=dict(cpu='500m', memory='512Mi'))
    o = named('overlays/production', 'HorizontalPodAutoscaler', 'api')['spec']
    assert (o['minReplicas'], o['maxReplicas']) == (2, 10)
    cpu, memory = (m['resource']['target'] for m in o['metrics'])
    assert cpu['averageUtilization'] == 70 and in_bytes(memory['averageValue']) == pytest.approx(.8*2**29, rel=.01)
    spec = template(named('overlays/production', 'Deployment', 'api'))['spec']
    assert spec['terminationGracePeriodSeconds'] >= 20 + api['lifecycle']['preStop']['sleep']['seconds'] # uvicorn's, in serve/server.py
    assert named('overlays/production', 'Deployment', 'api')['spec']['strategy']['rollingUpdate']['maxUnavailable'] == 0

@pytest.mark.parametrize('what,kind,name', [('overlays/production', 'CronJob', 'train'), ('train-gpu', 'Job', 'train-gpu')])
def test_training_has_a_gpu(what, kind, name):
    spec = template(named(what, kind, name))['spec']
    assert str(spec['containers'][0]['resources']['limits']['nvidia.com/gpu']) == '1'
    assert [o['key'] for o in spec['tolerations']] == ['nvidia.com/gpu'] and any(m['mountPath'] == '/dev/shm' for m in spec['containers'][0]['volumeMounts'])
    assert sum('nvidia.com/gpu' in c['resources']['limits'] for _, p in pods(what) for c in containers(p)) == 1

def test_argo_cd_applies_things_in_order():
    waves = {}
    for o in found('overlays/production'): waves.setdefault(o['kind'], set()).add(int(o['metadata'].get('annotations', {})['argocd.argoproj.io/sync-wave']))
    first = dict(Namespace={-1}, ConfigMap={-1}, ServiceAccount={-1}, NetworkPolicy={-1}, Service={0}, CronJob={1}, Deployment={2}, HorizontalPodAutoscaler={2}, Ingress={2})
    assert {k: waves[k] for k in first} == first

def test_argo_cd_follows_the_production_overlay():
    app = yaml.safe_load((k8s/'argocd/application.yaml').read_text())
    assert (app['kind'], app['spec']['source']['path'], app['spec']['destination']['namespace']) == ('Application', 'kubernetes/overlays/production', 'plant-mlops')
    assert app['spec']['syncPolicy']['automated'] == dict(prune=True, selfHeal=True)

def test_a_second_model_is_configuration(tmp_path):
    near = lambda p: os.path.relpath(k8s/p, tmp_path.resolve())
    (tmp_path/'kustomization.yaml').write_text(yaml.safe_dump(dict(resources=[near('overlays/production')], components=[near('components/second-model')])))
    got, before = [o for o in yaml.safe_load_all(render(tmp_path.resolve()))], found('overlays/production')
    differ = [o for o in got if o not in before]
    assert len(got) == len(before) and sorted(o['kind'] for o in differ) == ['ConfigMap', 'Ingress']
    config, ingress = sorted(differ, key=lambda o: o['kind'])
    assert settings(models=config['data']['PLANT_MODELS']).models == 'stocks'
    [path] = [p for p in ingress['spec']['rules'][0]['http']['paths'] if p not in named('overlays/production', 'Ingress', 'plants')['spec']['rules'][0]['http']['paths']]
    assert path['path'] == '/models/stocks/predict' and path['backend']['service']['name'] == 'api'

@pytest.mark.parametrize('component', ['no-cronjobs', 'prometheus-operator'])
def test_an_overlay_can_have_a_component_more(component, tmp_path):
    near = lambda p: os.path.relpath(k8s/p, tmp_path.resolve())
    (tmp_path/'kustomization.yaml').write_text(yaml.safe_dump(dict(resources=[near('overlays/production')], components=[near(f'components/{component}')])))
    got = [o for o in yaml.safe_load_all(render(tmp_path.resolve()))]
    assert len(got) == len(found('overlays/production')) + (3 if component == 'prometheus-operator' else -len(jobs))
    watched = {}
    for m in [o['spec'] for o in got if o['kind'] == 'ServiceMonitor']:
        [service] = [o for o in kinds('overlays/production', 'Service') if selects(m['selector'], o['metadata']['labels'])]
        assert m['endpoints'][0]['port'] in {p['name'] for p in service['spec']['ports']}
        watched[service['metadata']['name']] = m['endpoints'][0]['relabelings'][0]['replacement'], m['endpoints'][0].get('honorLabels')
    assert component == 'no-cronjobs' or watched == dict(api=('api', None), exporter=('jobs', True)) # as in docker/prometheus/prometheus.yml
    for o in [o for o in got if o['kind'] == 'PrometheusRule']: assert yaml.safe_dump(o['spec']) == yaml.safe_dump(yaml.safe_load(prometheus_rule(root/'docker/prometheus/rules'))['spec']), 'run `make export`'

@pytest.fixture(scope='module')
def checkov():
    "The program, in an environment of its own inside this one, made once."
    venv, wanted = Path(sys.prefix)/'checkov', re.search(r'^checkov==.*', (root/'.github/checks.txt').read_text(), re.M)[0]
    made, uv = venv/wanted, Path(sys.executable).with_name('uv')
    if not made.exists():
        for cmd in ([uv, 'venv', '--quiet', '--clear', venv], [uv, 'pip', 'install', '--quiet', '--python', venv/'bin/python', wanted]):
            r = subprocess.run(cmd, capture_output=True, text=True, env=os.environ | dict(UV_SYSTEM_CERTS='1'))
            if r.returncode: missing('package index', r.stderr[-300:])
        made.touch()
    return venv/'bin/checkov'

def test_checkov_finds_nothing(checkov, tmp_path):
    (tmp_path/'k8s').mkdir()
    for o in all_of_it: (tmp_path/'k8s'/f"{o.replace('/', '-')}.yaml").write_text(text(o))
    for f in [*(root/'docker').rglob('Dockerfile*'), *(root/'docker').rglob('*.Dockerfile')]:
        to = tmp_path/'docker'/f.relative_to(root/'docker')
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)
    r = subprocess.run([checkov, '--config-file', str(k8s/'.checkov.yaml'), '--directory', str(tmp_path), '--output', 'json'], capture_output=True, text=True, cwd=tmp_path)
    reports = json.loads(r.stdout)
    reports = {o['check_type']: o for o in (reports if isinstance(reports, list) else [reports])}
    wrong = [f"{c['check_id']} {c['check_name']}: {c['resource']}" for o in reports.values() for c in o['results']['failed_checks']]
    assert not wrong and not r.returncode, '\n'.join(wrong) or r.stderr
    resources = sum(len(found(what)) for what in all_of_it)
    assert reports['kubernetes']['summary']['resource_count'] >= resources, 'it has not looked at everything'
    assert not (tmp_path/'docker').exists() or reports['dockerfile']['summary']['passed']

def test_every_skip_of_checkov_says_why():
    lines = (k8s/'.checkov.yaml').read_text().split('skip-check:')[1].strip().splitlines()
    assert lines and all(re.fullmatch(r'  - CKV2?_\w+ # .{20,}', f'  {o.strip()}') for o in lines)
