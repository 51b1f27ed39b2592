"A model file made by hand, and photos to try it on: for tests and for the examples of the serving notebooks."
import io, json
from PIL import Image

graph = """
<ir_version: 8, opset_import: ["": 13]>
tiny (uint8[N,64,64,3] images) => (float[N,2] probabilities, float[N,2] logits, float[N,3] embedding, float[N,8,8] heatmap, float[N] novelty)
<float[3,2] W = {9, -6, 3, 9, -12, -3}, float top = {255}, int64[2] around = {1, 3}, int64[1] one = {1}, float[3] middle = {0.5, 0.5, 0.5}> {
    bytes = Cast<to=1>(images)
    pixels = Div(bytes, top)
    embedding = ReduceMean<axes=[1,2], keepdims=0>(pixels)
    logits = MatMul(embedding, W)
    probabilities = Softmax(logits)
    away = Sub(embedding, middle)
    novelty = ReduceL2<axes=[1], keepdims=0>(away)
    each = MatMul(pixels, W)
    seen = Softmax<axis=3>(each)
    winner = Hardmax(logits)
    pick = Unsqueeze(winner, around)
    map = MatMul(seen, pick)
    channel = Transpose<perm=[0,3,1,2]>(map)
    small = AveragePool<kernel_shape=[8,8], strides=[8,8]>(channel)
    heatmap = Squeeze(small, one)
}
"""

def tiny_model(classes=('dandelion', 'grass'), version='1', source='synthetic', **metadata) -> bytes:
    "The graph above as an ONNX file; `classes` are what is yellow and what is green."
    from onnx import helper, parser
    model = parser.parse_model(graph.strip())
    meta = dict(classes=classes, version=version, input=dict(kind='image', shape=[None, 64, 64, 3], resize=dict(side=64, size=64)), temperature=1.,
                metrics=dict(accuracy=.9, accuracy_low=.8, accuracy_high=.95, n=60), provenance=dict(source=source, arch='mean colour', dataset='none'))
    helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in (meta | metadata).items()})
    return model.SerializeToString()

def jpeg(photo='gold', format='JPEG', **kw) -> bytes:
    "A photo as a file; from a colour's name, one of that colour."
    if isinstance(photo, str): photo = Image.new('RGB', (320, 240), photo)
    photo.save(b := io.BytesIO(), format, **kw)
    return b.getvalue()

def publish(s, version='1', data=None, alias='champion', **kw):
    "Publish a model file as `promote` does, or `challenge`; keywords go into the pointer."
    from plant_mlops.core.store import open_store, sha256_of
    data, key, store = data or tiny_model(version=version), f'models/{s.model}/{version}/model.onnx', open_store(s)
    store.put(key, data)
    pointer = dict(name=s.model, version=version, key=key, sha256=sha256_of(data)) | kw
    store.put(f'models/{s.model}/{alias}.json', json.dumps(pointer).encode())

def tiny_home(s, n=60, versions=2, relabel=2):
    "All that `plant-mlops run` leaves but a trained network: drawn photos, two of them with the wrong label, a photo that is not there, a data set, runs, and versions of the model above, the last one in production."
    import numpy as np
    from PIL import Image
    from plant_mlops.data.catalog import add_rows, open_catalog, rows
    from plant_mlops.data.dataset import build_dataset, load_dataset
    from plant_mlops.registry.registry import promote, register
    from plant_mlops.registry.tracking import experiment_id, mlflow_client
    from plant_mlops.photos.stages import fill, ingest, prepare
    def see(images): # 8 × 8 pixels as an embedding
        x = np.stack([np.asarray(Image.fromarray(o).resize((8, 8)), np.float32).ravel() for o in images]) - 110
        return x/np.linalg.norm(x, axis=1, keepdims=True)
    fill(s, synthetic=n)
    eng = open_catalog(s)
    other = dict(dandelion='grass', grass='dandelion')
    add_rows(eng, [dict(url_source=o['url_source'], label=other[o['label']]) for o in rows(eng)[:relabel]] + [dict(url_source='file:///nowhere/lost.jpg', label='grass')])
    eng.dispose()
    ingest(s, progress=False), prepare(s, progress=False)
    dataset = build_dataset(s, see, progress=False)
    for v in range(1, versions + 1):
        with mlflow_client(s) as c:
            run = c.create_run(experiment_id(c, s), tags=dict(dataset=dataset, source='synthetic')).info.run_id
            for k, o in dict(arch='mean colour', epochs=3, lr=v*1e-3, dataset=dataset).items(): c.log_param(run, k, o)
            for e in range(3):
                for k, o in dict(train_loss=.6/(e + v), valid_loss=.7/(e + v), accuracy=.8 + .05*e).items(): c.log_metric(run, k, o, step=e + 1)
            c.set_terminated(run)
        register(s, run, tiny_model(provenance=dict(source='synthetic', arch='mean colour', dataset=dataset), novelty=dict(threshold=.9)))
        promote(s, force=v > 1)
    return load_dataset(s, dataset)
