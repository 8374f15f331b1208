"""Workers, in processes and on a real local Ray cluster: the same bits, also when one is killed."""

import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import workers
from moesvd_quant.memory.pool import Pool, WorkerError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    folder = tempfile.mkdtemp(prefix="mq-", dir="/tmp")  # its own, and short: sockets lie in it
    found.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment, _temp_dir=folder)
    yield found
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def run(folder, out, small, recipe="svd-gptq3", **how):
    return Run(load_recipe(recipe, small), folder, out, **how).run()


def files(out: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("run.json", ".lock")]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths}


def test_processes_do_the_work_and_a_dead_one_is_replaced(tmp_path):
    pool = Pool(2)
    assert dict(pool.map(workers.square, [1, 2, 3], CPU)) == {n: (n * n, torch.get_num_threads()) for n in (1, 2, 3)}
    assert sorted(pool.map(partial(workers.die_once, tmp_path), [1, 2, 3], CPU)) == [(1, 1), (2, 2), (3, 3)]
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_errors_of_processes_are_those_of_the_work():
    with pytest.raises(ValueError, match="layer 1: cannot be"):
        list(Pool(2).map(workers.fail, [1], CPU))
    with pytest.raises(WorkerError, match=r"workers died 4 times.*Try fewer --workers"):
        list(Pool(2).map(workers.die, [1], CPU))


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(make_model, tmp_path, small):
    folder = make_model("qwen3_moe")
    run(folder, tmp_path / "one", small)
    run(folder, tmp_path / "two", small, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not list((tmp_path / "two").glob(".work*"))


@pytest.mark.slow
@pytest.mark.long
def test_ray_does_the_work_and_a_dead_worker_is_replaced(ray, tmp_path):
    pool = Pool(2, "ray")
    assert dict(pool.map(workers.square, [1, 2, 3], CPU)) == {n: (n * n, torch.get_num_threads()) for n in (1, 2, 3)}
    assert sorted(pool.map(partial(workers.die_once, tmp_path), [1, 2, 3], CPU)) == [(1, 1), (2, 2), (3, 3)]
    assert (tmp_path / "died").exists()
    with pytest.raises(ValueError, match="layer 1: cannot be"):
        list(pool.map(workers.fail, [1], CPU))


def kill_a_worker(ray, killed: list, stop: threading.Event) -> None:
    """Kills the first busy worker of this cluster, once."""
    session = ray._private.worker._global_node.session_name
    while not stop.is_set() and not killed:
        for process in psutil.process_iter(["name", "cmdline"]):
            try:
                busy = "ray::_task" in " ".join(process.info["cmdline"] or [])
                if busy and session in " ".join(process.parent().cmdline()):
                    time.sleep(0.5)
                    process.kill()
                    killed.append(process.pid)
                    break
            except (psutil.Error, AttributeError):
                continue
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("recipe,options", [("svd-gptq3", []), ("d2-paper", ["d2.ratio=0.25"])])
def test_a_killed_ray_worker_changes_nothing(ray, recipe, options, make_model, tmp_path, small):
    folder, killed, stop = make_model("mixtral", num_hidden_layers=4), [], threading.Event()
    small = [*small, *options]
    run(folder, tmp_path / "one", small, recipe)
    killer = threading.Thread(target=kill_a_worker, args=(ray, killed, stop))
    killer.start()
    try:
        run(folder, tmp_path / "ray", small, recipe, workers=2, executor="ray")
    finally:
        stop.set()
        killer.join()
    assert killed
    assert files(tmp_path / "one") == files(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.long
def test_interrupted_on_ray_it_goes_on_layer_by_layer(ray, make_model, tmp_path, small):
    folder = make_model("mixtral", num_hidden_layers=4)
    run(folder, tmp_path / "whole", small)

    class Stop(Exception):
        pass

    def stop(what, done, total):
        if what == "gptq: layers" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(folder, tmp_path / "parts", small, report=stop, workers=2, executor="ray")
    (work,) = (tmp_path / "parts").glob(".work-02-*")
    before = {path.name: path.stat().st_mtime_ns for path in work.glob("model-layer-*")}
    assert 2 <= len(before) <= 4
    run(folder, tmp_path / "parts", small, workers=2, executor="ray")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts" / "02-gptq").glob("model-layer-*")}
    assert before.items() <= after.items()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
