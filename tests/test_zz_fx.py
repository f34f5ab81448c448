from jsurgery.wan.pipeline import load_pipeline
import diffusers, pytest
def test_loads(tiny_pipeline):
    p = load_pipeline(str(tiny_pipeline))
    print({d.name: sum(f.stat().st_size for f in d.rglob("*")) for d in tiny_pipeline.iterdir()})
