"""What is told of memory and time, fitted: constants that were put in are found, and runs are recipes."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import fit, probe, runs, shapes, whole
from benchmarks.fit import Held
from lowres_ft import deferred
from lowres_ft.speed import Rates, Share


def held(in_heap, heap, *, single, peak, tensors, grown=0):
    return Held(peak * 10**6, tensors * 10**6, 1e6 * in_heap, heap, single, grown * 10**6)


def test_constants_of_memory_are_found():
    several = [
        held(100, "mapped", single=True, peak=440 + 25 + 10, tensors=10, grown=5),
        held(400, "mapped", single=False, peak=440 + 30 + 100 + 90, tensors=90, grown=26),
        held(200, "heap", single=False, peak=440 + 30 + 150 + 70, tensors=70),
        held(0, "heap", single=True, peak=440 + 500, tensors=500),
    ]
    found = fit.constants(several)
    assert [(one["libraries"], one["sixteen"]) for one in found.values()] == [
        pytest.approx((440e6, 30e6), rel=1e-3)
    ] * 2
    assert (found["mapped"]["fragmentation"], found["heap"]["fragmentation"]) == pytest.approx((0.25, 0.75), rel=1e-3)
    assert (found["mapped"]["growth"], found["heap"]["growth"]) == pytest.approx((0.2, 0.0), abs=1e-3)
    of_fp32 = fit.constants([one for one in several if one.single])
    assert all("sixteen" not in constants for constants in of_fp32.values())  # none tells of it, so it stays


def test_each_run_is_told_by_constants_of_the_others():
    several = [
        held(in_heap, "heap", single=single, peak=440 + beside, tensors=0, grown=round(0.2 * beside))
        for in_heap, single, beside in ((100, True, 50), (400, False, 230), (200, False, 130), (300, True, 150))
    ]
    assert fit.left_out(several) == pytest.approx((0, 0), abs=1e-3)
    odd = held(200, "heap", single=True, peak=2 * 540, tensors=0, grown=20)  # others tell of 540, and 20 after a probe
    told, measured = fit.left_out([*several, odd])
    assert told > 0.5 / 5**0.5 * 0.99
    assert measured < told


def test_what_comes_after_a_probe_is_found_by_itself(monkeypatch):
    table = {
        "heap": {"libraries": 440_000_000, "sixteen": 30_000_000, "fragmentation": 0.5, "growth": 0.9},
        "bound": {"libraries": 450_000_000, "sixteen": 0, "fragmentation": 1.0, "growth": 0.9},
        "cuda": {"libraries": 500_000_000, "sixteen": 0, "fragmentation": 0.1},
    }
    written = {}
    monkeypatch.setattr(fit.tables, "read", lambda _: dict(table))
    monkeypatch.setattr(fit.files, "write_json", lambda path, found: written.update({path.name: found}))
    monkeypatch.setattr(Held, "of", lambda run: run)
    runs = [held(100, "heap", single=False, peak=600, tensors=80, grown=16)]  # of 30 + 50
    bound = [held(100, "bound", single=True, peak=600, tensors=80, grown=5)]
    fit._write_memory((runs, bound), growth_alone=True)
    assert written == {
        "memory.json": table | {"heap": table["heap"] | {"growth": 0.2}, "bound": table["bound"] | {"growth": 0.05}}
    }


def test_the_share_that_a_processor_reaches_is_found():
    rates = Rates(flops={"float32": 1e11}, bandwidth=1e10, link=1e9)

    put_in = Share(products=0.5, bandwidth=0.8, functions=0.03, start=2e-5)

    class Imagined:
        def __init__(self, flops, moved, functions, operations):
            self.flops, self.moved, self.functions, self.operations = flops, moved, functions, operations

        def told(self, rates, share):
            products = self.flops / rates.flops["float32"] / share.products
            moved = (self.moved / share.bandwidth + self.functions / share.functions) / rates.bandwidth
            return products + moved + self.operations * share.start

    several = [
        *(Imagined(1e12, 1e10, 1e8, 1e4), Imagined(1e11, 1e11, 1e8, 1e4), Imagined(1e11, 1e10, 1e8, 1e6)),
        *(Imagined(1e11, 1e10, 1e10, 1e4), Imagined(3e11, 3e10, 3e8, 1)),
    ]
    faster = rates.model_copy(update={"bandwidth": 2e10})
    seen = [fit.Seen(one, known, one.told(known, put_in)) for one in several for known in (rates, faster)]
    found = fit.reached(seen, Share(products=1.0, bandwidth=1.0, functions=0.1, start=1e-5))
    assert found.model_dump() == pytest.approx(put_in.model_dump(), rel=0.02)


def test_runs_of_other_machines_are_taken_from_their_records():
    rates = Rates(flops={"float32": 1e11}, bandwidth=1e10, link=1e9)
    several = [SimpleNamespace(run=run, steps=[9.0, 1.0, 2.0]) for run in runs.FITTED[:2]]
    took = [{"run": run.name, "measured": {"seconds": 5.0}} for run in (runs.FITTED[1], runs.JUDGED[0])]
    other = {"rates": rates.model_dump() | {"bandwidth": 3e10}, "runs": took}
    seen = fit.Seen.of(several, rates, [other])
    assert [one.seconds for one in seen] == [3.0, 3.0, 5.0]
    assert [one.run.known.run for one in seen] == [*runs.FITTED[:2], runs.FITTED[1]]
    assert [one.rates.bandwidth for one in seen] == [1e10, 1e10, 3e10]


def test_the_runs_that_judge_are_not_those_that_were_fitted():
    every = (*runs.FITTED, *runs.BOUND, *runs.JUDGED)
    assert len({(run.shape, run.task, run.length, run.changes) for run in every}) == len(every)
    assert len(runs.FITTED) == 12
    assert len(runs.JUDGED) >= 16
    assert len({run.key for run in every}) == len(every)
    assert {run.shape for run in every} == {*shapes.SHAPES}
    assert {run.shape for run in runs.JUDGED} - {run.shape for run in runs.FITTED}


def test_every_run_is_a_recipe(tmp_path):
    for run in (*runs.FITTED, *runs.BOUND, *runs.JUDGED):
        found = shapes.recipe(tmp_path, tmp_path / "rows.jsonl", run.task, run.length, *run.settings)
        assert found.task.max_length == run.length
        assert found.train.steps == run.steps


def test_what_was_told_is_compared_with_what_was_measured():
    told, probed = {"memory_bytes": 90, "seconds": 12.0}, {"memory_bytes": 95, "seconds": 11.0}
    measured = {"peak_bytes": 100, "train_seconds": 10.0}
    found = probe.record(runs.JUDGED[0], {"plan": told | {"probe": probed}, "measured": measured})
    assert found["told_error"] == pytest.approx({"memory_bytes": -0.1, "seconds": 0.2})
    assert found["probed_error"] == pytest.approx({"memory_bytes": -0.05, "seconds": 0.1})


def test_a_run_tells_its_stages_and_the_seconds_of_its_steps(tmp_path, bases, reviews, monkeypatch):
    monkeypatch.setattr(deferred, "begin", lambda: None)  # it would last as long as this process
    with open(tmp_path / "log.jsonl", "w+", encoding="utf-8") as log:
        changes = ("train.steps=3", "model.dtype=float32", "task.labels=[bad, good]")
        whole.main([str(bases("bert")), str(reviews), "classification", "32", str(tmp_path / "out"), *changes], log)
        log.seek(0)
        told = [SimpleNamespace(**line) for line in map(json.loads, log)]
    assert sum(hasattr(one, "seconds") for one in told) == 3
    stages = [one for one in told if hasattr(one, "stage")]
    assert any(one.stage.startswith("training on") for one in stages)
    assert all(0 < one.now <= one.peak for one in stages)
