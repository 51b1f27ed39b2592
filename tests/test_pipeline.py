"The pipeline of Kubeflow: its file by Kubeflow's own messages, and a run of it by `kfp.local`."
import json, subprocess, sys
import pytest
from conftest import fences
from test_jobs import plant

pytestmark = pytest.mark.timeout(900)

def parsed(path):
    "The file as the messages that Kubeflow reads; a field that they do not know is an error."
    import yaml
    from google.protobuf.json_format import ParseDict
    from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
    from kfp.pipeline_spec import pipeline_spec_pb2 as pb
    spec, platform = yaml.safe_load_all(path.read_text())
    ParseDict(platform, pb.PlatformSpec())
    own = platform['platforms']['kubernetes']['deploymentSpec']['executors']
    return (ParseDict(spec, pb.PipelineSpec()), ParseDict(spec['deploymentSpec'], pb.PipelineDeploymentConfig()).executors,
            {k: ParseDict(v, KubernetesExecutorConfig()) for k, v in own.items()})

def test_file(tmp_path):
    f = tmp_path/'plants.yaml'
    plant('pipeline', 'compile', f, '--image', 'registry.example/plants:1', '--gpu', 1, '--env', 'PLANT_STORE_URL=s3://plants', '--secret', 's3=PLANT_S3_ACCESS_KEY,PLANT_S3_SECRET_KEY', home=None)
    spec, executors, own = parsed(f)
    tasks = spec.root.dag.tasks
    assert set(tasks) == {'ingest', 'ingest-2', 'prepare', 'train', 'evaluate', 'promote'}
    assert {*tasks['prepare'].dependent_tasks} == {'ingest', 'ingest-2'} and [*tasks['promote'].dependent_tasks] == ['evaluate']
    assert tasks['ingest-2'].inputs.parameters['shard'].runtime_value.constant.string_value == '2/2'
    assert tasks['ingest'].retry_policy.max_retry_count == 2 and not any(t.caching_options.enable_cache for t in tasks.values())
    assert spec.root.input_definitions.parameters['photos'].description
    assert executors['exec-train'].container.resources.accelerator.resource_type == 'nvidia.com/gpu' and not executors['exec-promote'].container.HasField('resources')
    assert {e.container.image for e in executors.values()} == {'registry.example/plants:1'} and not any('pip install' in o for e in executors.values() for o in e.container.command)
    assert own['exec-train'].active_deadline_seconds > 6*3600 and own['exec-train'].secret_as_env[0].secret_name == 's3'

def test_another_workload(tmp_path):
    f, stocks = tmp_path/'stocks.yaml', dict(PLANT_MODEL='stocks')
    plant('pipeline', 'compile', f, '--image', 'registry.example/plants:1', home=None, **stocks)
    spec, executors, own = parsed(f)
    assert spec.pipeline_info.name == 'stocks' and set(spec.root.dag.tasks) == {'stocks-ingest', 'stocks-train', 'stocks-promote'}
    assert [*spec.root.dag.tasks['stocks-promote'].dependent_tasks] == ['stocks-train'] and spec.root.input_definitions.parameters['kind'].description
    r = json.loads(plant('pipeline', 'run', '-p', 'kind', 'logistic', '-p', 'days', 700, '--json', home=tmp_path/'home', **stocks))
    assert r['stocks-promote']['outputs']['promoted'] and r['stocks-promote']['news'] == ['stocks-champion']
    assert json.loads(plant('status', '--json', home=tmp_path/'home', **stocks))['version'] == '1'

def test_run_without_a_cluster(tmp_path):
    home = tmp_path/'home'
    assert '✗ ingest' in (said := plant('pipeline', 'run', '-p', 'photos', '/nowhere', home=home, ok=1)) and '/nowhere is not a folder' in said
    assert "None of ingest" in plant('pipeline', 'run', '-p', 'sed', 1, home=home, ok=2)
    told, = (t for _, t in fences('nbs/guides/kubeflow.ipynb') if t.startswith('plant-mlops pipeline run'))
    r = json.loads(plant(*told.split()[1:], '--shards', 2, '--json', home=home))
    assert r['promote']['outputs']['promoted'] and r['promote']['news'] == ['champion'] and r['ingest']['outputs']['stored'] == 30 # of 60
    assert json.loads(plant('status', '--json', home=home))['version'] == '1'

def test_import_without_kfp_or_airflow():
    code = 'import sys, plant_mlops.targets.kubeflow, plant_mlops.targets.airflow; assert not {"kfp", "airflow"} & {*sys.modules}'
    subprocess.run([sys.executable, '-c', code], check=True)
