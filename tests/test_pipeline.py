"The pipeline of Kubeflow: its file by Kubeflow's own messages, and a run of it by `kfp.local`."
import json, subprocess, sys
import pytest
from helpers import fences, plant, plant_messages

pytestmark = pytest.mark.timeout(900)
IMAGE = 'registry.example/plants:1'

def parse(path):
    "A pipeline file as the messages that Kubeflow reads; a field that they do not know is an error."
    import yaml
    from google.protobuf.json_format import ParseDict
    from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
    from kfp.pipeline_spec import pipeline_spec_pb2 as pb
    spec, platform = yaml.safe_load_all(path.read_text())
    ParseDict(platform, pb.PlatformSpec())
    executors = ParseDict(spec['deploymentSpec'], pb.PipelineDeploymentConfig()).executors
    on_kubernetes = platform['platforms']['kubernetes']['deploymentSpec']['executors']
    on_kubernetes = {k: ParseDict(v, KubernetesExecutorConfig()) for k, v in on_kubernetes.items()}
    return ParseDict(spec, pb.PipelineSpec()), executors, on_kubernetes

@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
    "The pipeline of photos, with all options."
    file = tmp_path_factory.mktemp('pipeline')/'plants.yaml'
    secret = 's3=PLANT_S3_ACCESS_KEY,PLANT_S3_SECRET_KEY'
    options = ['--gpu', 1, '--env', 'PLANT_STORE_URL=s3://plants', '--secret', secret]
    plant('pipeline', 'compile', file, '--image', IMAGE, *options, home=None)
    return parse(file)

def test_steps_follow_each_other_and_shards_run_side_by_side(compiled):
    tasks = compiled[0].root.dag.tasks
    assert set(tasks) == {'ingest', 'ingest-2', 'prepare', 'train', 'evaluate', 'promote'}
    assert {*tasks['prepare'].dependent_tasks} == {'ingest', 'ingest-2'}
    assert [*tasks['promote'].dependent_tasks] == ['evaluate']
    assert tasks['ingest-2'].inputs.parameters['shard'].runtime_value.constant.string_value == '2/2'

def test_steps_are_retried_and_never_cached(compiled):
    tasks = compiled[0].root.dag.tasks
    assert tasks['ingest'].retry_policy.max_retry_count == 2
    assert not any(t.caching_options.enable_cache for t in tasks.values())

def test_parameters_are_described(compiled):
    assert compiled[0].root.input_definitions.parameters['photos'].description

def test_containers_have_image_gpu_time_limit_and_secrets(compiled):
    _, executors, on_kubernetes = compiled
    containers = {k: e.container for k, e in executors.items()}
    assert containers['exec-train'].resources.accelerator.resource_type == 'nvidia.com/gpu'
    assert not containers['exec-promote'].HasField('resources')
    assert {c.image for c in containers.values()} == {IMAGE}
    assert not any('pip install' in o for c in containers.values() for o in c.command)
    assert on_kubernetes['exec-train'].active_deadline_seconds > 6*3600
    assert on_kubernetes['exec-train'].secret_as_env[0].secret_name == 's3'

def test_the_pipeline_of_another_workload_is_compiled_and_runs(tmp_path):
    file, home, stocks = tmp_path/'stocks.yaml', tmp_path/'home', dict(PLANT_MODEL='stocks')
    plant('pipeline', 'compile', file, '--image', IMAGE, home=None, **stocks)
    spec, _, _ = parse(file)
    tasks = spec.root.dag.tasks
    assert spec.pipeline_info.name == 'stocks'
    assert set(tasks) == {'stocks-ingest', 'stocks-train', 'stocks-promote'}
    assert [*tasks['stocks-promote'].dependent_tasks] == ['stocks-train']
    assert spec.root.input_definitions.parameters['kind'].description
    args = ['pipeline', 'run', '-p', 'kind', 'logistic', '-p', 'days', 700, '--json']
    result = json.loads(plant(*args, home=home, **stocks))['stocks-promote']
    assert result['outputs']['promoted'] and result['news'] == ['stocks-champion']
    assert json.loads(plant('status', '--json', home=home, **stocks))['version'] == '1'

def test_a_failed_step_is_named_with_its_error(tmp_path):
    message = plant_messages('pipeline', 'run', '-p', 'photos', '/nowhere', home=tmp_path/'home', ok=1)
    assert '✗ ingest' in message and '/nowhere is not a folder' in message

def test_unknown_parameters_are_refused(tmp_path):
    assert 'None of ingest' in plant_messages('pipeline', 'run', '-p', 'sed', 1, home=tmp_path/'home', ok=2)

def test_the_command_of_the_guide_runs_without_a_cluster(tmp_path):
    home = tmp_path/'home'
    command, = (t for _, t in fences('nbs/guides/kubeflow.ipynb') if t.startswith('plant-mlops pipeline run'))
    result = json.loads(plant(*command.split()[1:], '--shards', 2, '--json', home=home))
    assert result['promote']['outputs']['promoted'] and result['promote']['news'] == ['champion']
    assert result['ingest']['outputs']['stored'] == 30 # of 60
    assert json.loads(plant('status', '--json', home=home))['version'] == '1'

def test_targets_are_imported_without_kfp_or_airflow():
    imports = 'import sys, plant_mlops.targets.kubeflow, plant_mlops.targets.airflow'
    check = 'assert not {"kfp", "airflow"} & {*sys.modules}'
    subprocess.run([sys.executable, '-c', f'{imports}; {check}'], check=True)
