"The Kubernetes manifests, as far as they can be checked without a cluster."
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
production = 'overlays/production'
overlays = ['overlays/local', production]
folders = [*overlays, 'train-gpu']
each_folder = pytest.mark.parametrize('folder', folders)
each_overlay = pytest.mark.parametrize('folder', overlays)

# -- Rendered manifests, and what is in them

def render(path) -> str:
    "What `kubectl apply -k` would apply; only the tests that call this are skipped where there is no kubectl."
    result = subprocess.run([require('kubectl'), 'kustomize', str(path)], capture_output=True, text=True)
    assert not result.returncode, result.stderr
    assert not result.stderr, result.stderr # kustomize warns of what is deprecated
    return result.stdout

@cache
def manifest(folder) -> str: return render(k8s/folder)

@cache
def resources(folder) -> list: return list(filter(None, yaml.safe_load_all(manifest(folder))))

def name_of(resource) -> str: return resource['metadata']['name']
def names_of(resources) -> set: return {name_of(resource) for resource in resources}
def describe(resource) -> str: return f"{resource['kind']} {name_of(resource)}"

def of_kind(folder, *kinds) -> list: return [resource for resource in resources(folder) if resource['kind'] in kinds]

def find_resource(folder, kind, name): return next(r for r in of_kind(folder, kind) if name_of(r) == name)

def pod_template(resource):
    "The pod template of a resource; None if it makes no pods."
    spec = resource.get('spec', {})
    if resource['kind'] == 'CronJob': return spec['jobTemplate']['spec']['template']
    return spec.get('template')

def pods(folder) -> list:
    "Each resource that makes pods: its description, and its pod template."
    templates = [(describe(resource), pod_template(resource)) for resource in resources(folder)]
    return [(name, pod) for name, pod in templates if pod]

def containers(pod) -> list: return pod['spec']['containers'] + pod['spec'].get('initContainers', [])

def all_containers(folder) -> list: return [container for _, pod in pods(folder) for container in containers(pod)]

def port_names(pod) -> set:
    return {port['name'] for container in containers(pod) for port in container.get('ports', [])}

def pod_labels(pod) -> dict: return pod['metadata']['labels']

SELECTOR_OPERATORS = dict(
    In=lambda value, values: value in values, NotIn=lambda value, values: value not in values,
    Exists=lambda value, values: value is not None, DoesNotExist=lambda value, values: value is None)

def selects(selector, labels) -> bool:
    "Whether a label selector matches."
    def matches(expression):
        operator = SELECTOR_OPERATORS[expression['operator']]
        return operator(labels.get(expression['key']), expression.get('values'))
    have_labels = all(labels.get(k) == v for k, v in selector.get('matchLabels', {}).items())
    return have_labels and all(matches(expression) for expression in selector.get('matchExpressions', []))

def select_pods(folder, selector) -> list: return [pod for _, pod in pods(folder) if selects(selector, pod_labels(pod))]

def to_bytes(quantity) -> int:
    "Bytes of a quantity such as 512Mi."
    return int(re.match(r'\d+', quantity)[0]) * {'Mi': 2**20, 'Gi': 2**30}[quantity[-2:]]

# -- Tests of all resources

@each_folder
def test_manifest_has_no_secrets_and_all_of_it_is_in_one_namespace(folder):
    assert resources(folder)
    assert not of_kind(folder, 'Secret')
    for resource in resources(folder):
        metadata = resource['metadata']
        assert resource['kind'] == 'Namespace' or metadata.get('namespace') == 'plant-mlops', metadata
    ids = [describe(resource) for resource in resources(folder)]
    assert len(ids) == len(set(ids))

@pytest.mark.needs('kubernetes-validate')
@pytest.mark.parametrize('version', [f'1.{minor}' for minor in range(31, 38)])
def test_resources_are_valid_in_each_version_of_kubernetes(version, monkeypatch):
    from kubernetes_validate import utils
    assert version in map(utils.major_minor, utils.all_versions()) # otherwise it would take an older one
    monkeypatch.setattr(utils, 'schema_contents', cache(utils.schema_contents)) # it reads a megabyte for each resource
    for resource in [resource for folder in folders for resource in resources(folder)]:
        try: utils.validate(resource, version, strict=True)
        except utils.ValidationError as error:
            path = '.'.join(map(str, error.path))
            pytest.fail(f'{describe(resource)}: {path}: {error.message}')

def check_pod_security(name, spec):
    assert spec['automountServiceAccountToken'] is False, name
    assert spec['serviceAccountName'] != 'default', name
    assert not any(spec.get(key) for key in ('hostNetwork', 'hostPID', 'hostIPC')), name
    context = spec['securityContext']
    assert context['runAsNonRoot'] is True, name
    assert context['runAsUser'] == context['runAsGroup'] == context['fsGroup'] == 10001, name
    assert context['seccompProfile'] == {'type': 'RuntimeDefault'}, name
    for volume in spec.get('volumes', []):
        assert {*volume} - {'name'} <= {'emptyDir', 'persistentVolumeClaim', 'configMap'}, name

def check_container_security(name, container):
    context = container['securityContext']
    assert context['allowPrivilegeEscalation'] is False, name
    assert context['readOnlyRootFilesystem'] is True, name
    assert context['capabilities'] == {'drop': ['ALL']}, name
    assert not context.get('privileged'), name
    assert context.get('runAsUser', 10001) == 10001, name

def check_container_resources(name, container):
    requests, limits = container['resources']['requests'], container['resources']['limits']
    assert {'cpu', 'memory'} <= {*requests} & {*limits}, name
    assert to_bytes(requests['memory']) <= to_bytes(limits['memory']), name

@each_folder
def test_pods_are_restricted_and_have_limits_and_pinned_images(folder):
    for name, pod in pods(folder):
        check_pod_security(name, pod['spec'])
        for container in containers(pod):
            check_container_security(name, container)
            check_container_resources(name, container)
            assert {'/tmp', '/data'} <= {mount['mountPath'] for mount in container['volumeMounts']}, name
            image = container['image']
            assert re.search(r':[\w.-]+(@sha256:[0-9a-f]{64})?$', image), image
            assert not image.endswith(':latest'), image

def secret_keys(folder) -> set:
    "Keys of the secret that a user makes."
    lines = (k8s/'secret.env.example').read_text().splitlines()
    keys = {line.split('=')[0] for line in lines if '=' in line}
    return keys | {'POSTGRES_PASSWORD'} if folder == 'overlays/local' else keys

def volume_names(name, pod) -> set:
    "Volumes of a pod, with that which a StatefulSet makes for each."
    volumes = {volume['name'] for volume in pod['spec'].get('volumes', [])}
    return volumes | {'data'} if name.startswith('StatefulSet') else volumes

@each_folder
def test_service_accounts_volumes_config_maps_secrets_and_roles_that_are_referred_to_exist(folder):
    available = resources(folder) if folder in overlays else resources(folder) + resources(production)
    config_maps = names_of(r for r in available if r['kind'] == 'ConfigMap')
    service_accounts = names_of(r for r in available if r['kind'] == 'ServiceAccount')
    for name, pod in pods(folder):
        assert pod['spec']['serviceAccountName'] in service_accounts, name
        for container in containers(pod):
            assert {mount['name'] for mount in container['volumeMounts']} <= volume_names(name, pod), name
            for source in container.get('envFrom', []):
                assert source.get('configMapRef', {}).get('name') in {*config_maps, None}, name
                assert source.get('secretRef', {}).get('name') in {'plant-mlops', None}, name
            for variable in container.get('env', []):
                reference = variable.get('valueFrom', {}).get('secretKeyRef')
                if reference is None: continue
                assert reference['name'] == 'plant-mlops', (name, variable)
                assert reference['key'] in secret_keys(folder), (name, variable)
    roles = names_of(of_kind(folder, 'Role'))
    for binding in of_kind(folder, 'RoleBinding'): assert binding['roleRef']['name'] in roles

@each_folder
def test_every_variable_is_a_setting(folder):
    known = {f'PLANT_{field.upper()}' for field in Settings.model_fields}
    names = [key for config_map in of_kind(folder, 'ConfigMap') for key in config_map['data']]
    names += [variable['name'] for container in all_containers(folder) for variable in container.get('env', [])]
    assert {name for name in names if name.startswith('PLANT_')} <= known

# -- Tests of the overlays

@each_overlay
def test_workloads_services_budgets_and_autoscalers_select_pods_and_ports_that_exist(folder):
    for workload in of_kind(folder, 'Deployment', 'StatefulSet'):
        assert selects(workload['spec']['selector'], pod_labels(pod_template(workload))), workload['metadata']
    for budget in of_kind(folder, 'PodDisruptionBudget'):
        assert select_pods(folder, budget['spec']['selector']), budget['metadata']
    for autoscaler in of_kind(folder, 'HorizontalPodAutoscaler'):
        target = autoscaler['spec']['scaleTargetRef']
        assert 'replicas' not in find_resource(folder, target['kind'], target['name'])['spec']
    for service in of_kind(folder, 'Service'):
        targets = select_pods(folder, {'matchLabels': service['spec']['selector']})
        assert targets, service['metadata']
        for port in service['spec']['ports']:
            assert all(port['targetPort'] in port_names(pod) for pod in targets), service['metadata']

@each_overlay
def test_ingress_paths_lead_to_ports_of_services(folder):
    for ingress in of_kind(folder, 'Ingress'):
        for path in [path for rule in ingress['spec']['rules'] for path in rule['http']['paths']]:
            backend = path['backend']['service']
            service = find_resource(folder, 'Service', backend['name'])
            assert backend['port']['name'] in {port['name'] for port in service['spec']['ports']}

@each_overlay
def test_probes_use_ports_of_their_pod(folder):
    for name, pod in pods(folder):
        for container in containers(pod):
            names = ('startupProbe', 'livenessProbe', 'readinessProbe')
            for probe in [container[probe] for probe in names if probe in container]:
                if 'exec' in probe: continue
                action = probe.get('httpGet') or probe['tcpSocket']
                assert action['port'] in port_names(pod), name

def network_policies(folder) -> dict: return {name_of(r): r['spec'] for r in of_kind(folder, 'NetworkPolicy')}

def policy_rules(spec) -> list: return spec.get('ingress', []) + spec.get('egress', [])

def rule_peers(rule) -> list: return rule.get('from', []) + rule.get('to', [])

def is_cluster_pod_peer(peer) -> bool: return 'podSelector' in peer and 'namespaceSelector' not in peer

@each_overlay
def test_network_policies_deny_by_default_and_refer_to_pods_and_ports_that_exist(folder):
    policies = network_policies(folder)
    assert policies['default-deny'] == dict(podSelector={}, policyTypes=['Ingress', 'Egress'])
    for name, spec in policies.items():
        targets = select_pods(folder, spec['podSelector'])
        assert targets, f'{name} is for no pod'
        if name != 'default-deny': assert policy_rules(spec), name
        for rule in policy_rules(spec):
            assert rule.get('ports'), name
            assert rule_peers(rule), name
            for peer in filter(is_cluster_pod_peer, rule_peers(rule)):
                assert select_pods(folder, peer['podSelector']), f'{name} names a pod that does not exist'
            for port in [port['port'] for port in rule['ports']]:
                assert isinstance(port, int) or all(port in port_names(pod) for pod in targets), name
    [(_, gpu_pod)] = pods('train-gpu')
    assert selects(policies['to-services']['podSelector'], pod_labels(gpu_pod))

@each_overlay
def test_only_ingestion_may_connect_to_the_internet_and_not_to_private_addresses(folder):
    policies = network_policies(folder)
    def ip_blocks(spec):
        return [peer['ipBlock'] for rule in spec.get('egress', []) for peer in rule['to'] if 'ipBlock' in peer]
    for block in [block for spec in policies.values() for block in ip_blocks(spec)]:
        if block['cidr'] == '0.0.0.0/0':
            assert {'169.254.0.0/16', '10.0.0.0/8', '172.16.0.0/12', '192.168.0.0/16'} <= {*block['except']}
        if block['cidr'] == '::/0': assert {'fc00::/7', 'fe80::/10'} <= {*block['except']}
    to_internet = [name for name, spec in policies.items() for block in ip_blocks(spec) if block['cidr'].endswith('/0')]
    assert {*to_internet} == {'ingest-to-internet'}
    allowed = select_pods(folder, policies['ingest-to-internet']['podSelector'])
    assert [pod_labels(pod).get('plant-mlops/job') for pod in allowed] == ['ingest']

# -- Jobs

def test_cronjobs_are_up_to_date_with_the_job_table():
    assert (k8s/'base/cronjobs.yaml').read_text() == cronjobs(settings()), 'run `make export`'

def args_of(pod) -> list: return [container['args'] for container in containers(pod)]

@each_overlay
def test_overlays_keep_schedules_limits_and_arguments_of_the_job_table(folder):
    specs = {name_of(r): r['spec'] for r in of_kind(folder, 'CronJob')}
    assert specs.keys() == jobs.keys()
    for name, spec in specs.items():
        expected = cronjob(settings(), jobs[name], '')['spec']
        for key in {*expected} - {'jobTemplate'}: assert spec[key] == expected[key], name
        job_spec, expected_job_spec = spec['jobTemplate']['spec'], expected['jobTemplate']['spec']
        for key in ('backoffLimit', 'activeDeadlineSeconds'): assert job_spec[key] == expected_job_spec[key], name
        assert args_of(job_spec['template']) == args_of(expected_job_spec['template']), name

def test_the_gpu_job_has_the_time_limit_and_command_of_the_training():
    spec = find_resource('train-gpu', 'Job', 'train-gpu')['spec']
    assert spec['activeDeadlineSeconds'] == jobs['train'].timeout + 180
    assert containers(spec['template'])[0]['args'] == ['job', 'run', 'train']

@pytest.mark.parametrize('folder,kind,name', [(production, 'CronJob', 'train'), ('train-gpu', 'Job', 'train-gpu')])
def test_only_training_has_a_gpu(folder, kind, name):
    spec = pod_template(find_resource(folder, kind, name))['spec']
    container = spec['containers'][0]
    assert str(container['resources']['limits']['nvidia.com/gpu']) == '1'
    assert [toleration['key'] for toleration in spec['tolerations']] == ['nvidia.com/gpu']
    assert any(mount['mountPath'] == '/dev/shm' for mount in container['volumeMounts'])
    assert sum('nvidia.com/gpu' in container['resources']['limits'] for container in all_containers(folder)) == 1

# -- The API

def test_the_api_scales_from_2_to_10_pods_at_70_percent_cpu_or_80_percent_memory():
    api = containers(pod_template(find_resource(production, 'Deployment', 'api')))[0]
    requests, limits = dict(cpu='100m', memory='128Mi'), dict(cpu='500m', memory='512Mi')
    assert api['resources'] == dict(requests=requests, limits=limits)
    spec = find_resource(production, 'HorizontalPodAutoscaler', 'api')['spec']
    assert (spec['minReplicas'], spec['maxReplicas']) == (2, 10)
    cpu, memory = (metric['resource']['target'] for metric in spec['metrics'])
    assert cpu['averageUtilization'] == 70
    assert to_bytes(memory['averageValue']) == pytest.approx(.8*2**29, rel=.01)

def test_an_update_of_the_api_interrupts_no_request():
    deployment = find_resource(production, 'Deployment', 'api')
    pod = pod_template(deployment)
    wait_before_stop = containers(pod)[0]['lifecycle']['preStop']['sleep']['seconds']
    uvicorn_timeout = 20 # in serve/server.py
    assert pod['spec']['terminationGracePeriodSeconds'] >= uvicorn_timeout + wait_before_stop
    assert deployment['spec']['strategy']['rollingUpdate']['maxUnavailable'] == 0

# -- Argo CD

def test_argo_cd_applies_resources_in_order():
    waves = {}
    for resource in resources(production):
        wave = int(resource['metadata'].get('annotations', {})['argocd.argoproj.io/sync-wave'])
        waves.setdefault(resource['kind'], set()).add(wave)
    expected = dict(Namespace={-1}, ConfigMap={-1}, ServiceAccount={-1}, NetworkPolicy={-1}, Service={0}, CronJob={1},
                    Deployment={2}, HorizontalPodAutoscaler={2}, Ingress={2})
    assert {kind: waves[kind] for kind in expected} == expected

def test_argo_cd_follows_the_production_overlay():
    application = yaml.safe_load((k8s/'argocd/application.yaml').read_text())
    spec = application['spec']
    assert application['kind'] == 'Application'
    assert spec['source']['path'] == 'kubernetes/overlays/production'
    assert spec['destination']['namespace'] == 'plant-mlops'
    assert spec['syncPolicy']['automated'] == dict(prune=True, selfHeal=True)

# -- Components

def render_with_component(component, tmp_path) -> list:
    "The resources of the production overlay with a component."
    folder = tmp_path.resolve()
    def relative(path): return os.path.relpath(k8s/path, folder)
    kustomization = dict(resources=[relative(production)], components=[relative(f'components/{component}')])
    (tmp_path/'kustomization.yaml').write_text(yaml.safe_dump(kustomization))
    return list(yaml.safe_load_all(render(folder)))

def ingress_paths(ingress) -> list: return ingress['spec']['rules'][0]['http']['paths']

def test_a_second_model_needs_only_a_setting_and_a_path_of_the_ingress(tmp_path):
    before, after = resources(production), render_with_component('second-model', tmp_path)
    changed = sorted([r for r in after if r not in before], key=lambda r: r['kind'])
    assert len(after) == len(before)
    assert [r['kind'] for r in changed] == ['ConfigMap', 'Ingress']
    config, ingress = changed
    assert settings(models=config['data']['PLANT_MODELS']).models == 'stocks'
    paths_before = ingress_paths(find_resource(production, 'Ingress', 'plants'))
    [path] = [path for path in ingress_paths(ingress) if path not in paths_before]
    assert path['path'] == '/models/stocks/predict'
    assert path['backend']['service']['name'] == 'api'

def test_the_component_no_cronjobs_removes_the_cronjobs(tmp_path):
    after = render_with_component('no-cronjobs', tmp_path)
    assert len(after) == len(resources(production)) - len(jobs)
    check_prometheus_rules(after)

def check_prometheus_rules(rendered):
    expected = yaml.safe_load(prometheus_rule(root/'docker/prometheus/rules'))['spec']
    for resource in rendered:
        if resource['kind'] != 'PrometheusRule': continue
        assert yaml.safe_dump(resource['spec']) == yaml.safe_dump(expected), 'run `make export`'

def test_the_component_prometheus_operator_scrapes_the_api_and_the_exporter(tmp_path):
    after = render_with_component('prometheus-operator', tmp_path)
    assert len(after) == len(resources(production)) + 3
    scraped = {}
    for spec in [r['spec'] for r in after if r['kind'] == 'ServiceMonitor']:
        services = of_kind(production, 'Service')
        [service] = [service for service in services if selects(spec['selector'], service['metadata']['labels'])]
        endpoint = spec['endpoints'][0]
        assert endpoint['port'] in {port['name'] for port in service['spec']['ports']}
        scraped[name_of(service)] = endpoint['relabelings'][0]['replacement'], endpoint.get('honorLabels')
    assert scraped == dict(api=('api', None), exporter=('jobs', True)) # as in docker/prometheus/prometheus.yml
    check_prometheus_rules(after)

# -- Checkov

@pytest.fixture(scope='module')
def checkov():
    "Path of the program, which is installed once, in an environment of its own inside this one."
    venv, uv = Path(sys.prefix)/'checkov', Path(sys.executable).with_name('uv')
    requirement = re.search(r'^checkov==.*', (root/'.github/checks.txt').read_text(), re.M)[0]
    installed = venv/requirement
    if not installed.exists():
        create = [uv, 'venv', '--quiet', '--clear', venv]
        install = [uv, 'pip', 'install', '--quiet', '--python', venv/'bin/python', requirement]
        for command in (create, install):
            env = os.environ | dict(UV_SYSTEM_CERTS='1')
            result = subprocess.run(command, capture_output=True, text=True, env=env)
            if result.returncode: missing('package index', result.stderr[-300:])
        installed.touch()
    return venv/'bin/checkov'

def copy_for_checkov(to):
    "Write the rendered manifests and the Dockerfiles to a folder."
    (to/'k8s').mkdir()
    for folder in folders: (to/'k8s'/f"{folder.replace('/', '-')}.yaml").write_text(manifest(folder))
    docker = root/'docker'
    for file in [*docker.rglob('Dockerfile*'), *docker.rglob('*.Dockerfile')]:
        copy = to/'docker'/file.relative_to(docker)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)

def test_checkov_finds_nothing(checkov, tmp_path):
    copy_for_checkov(tmp_path)
    options = ['--config-file', str(k8s/'.checkov.yaml'), '--directory', str(tmp_path), '--output', 'json']
    result = subprocess.run([checkov, *options], capture_output=True, text=True, cwd=tmp_path)
    reports = json.loads(result.stdout)
    if not isinstance(reports, list): reports = [reports]
    reports = {report['check_type']: report for report in reports}
    failed = [check for report in reports.values() for check in report['results']['failed_checks']]
    failed = [f"{check['check_id']} {check['check_name']}: {check['resource']}" for check in failed]
    assert not failed, '\n'.join(failed)
    assert not result.returncode, result.stderr
    count = sum(len(resources(folder)) for folder in folders)
    assert reports['kubernetes']['summary']['resource_count'] >= count, 'it has not checked everything'
    if (tmp_path/'docker').exists(): assert reports['dockerfile']['summary']['passed']

def test_every_check_that_checkov_skips_has_a_reason():
    lines = (k8s/'.checkov.yaml').read_text().split('skip-check:')[1].strip().splitlines()
    assert lines
    for line in lines: assert re.fullmatch(r'- CKV2?_\w+ # .{20,}', line.strip())
