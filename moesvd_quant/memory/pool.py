"""The layers of a phase, one after the other, in several processes, or on a Ray cluster: with the same result.

A task gets the pickled work of its phase and a number. It reads what it needs from folders that all workers share, and
gives back little. A worker that dies is replaced, and its task done again.
"""

import atexit
import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, Literal

import torch

from ..errors import MoesvdError, UsageError
from .allocator import disable_malloc_cache

RETRIES = 3  # of a task whose worker died

Work = Callable[[int], Any]


class WorkerError(MoesvdError, RuntimeError):
    """Workers die again and again; the message says what to look at."""


class Pool:
    """workers: tasks at a time. executor: `processes` of this machine, or `ray`: the cluster of $RAY_ADDRESS, or a
    local one. Processes live until `close`."""

    def __init__(self, workers: int = 1, executor: Literal["processes", "ray"] = "processes"):
        self.workers, self.executor = workers, executor
        self._processes: ProcessPoolExecutor | None = None

    @property
    def parallel(self) -> bool:
        return self.workers > 1 or self.executor == "ray"

    def map(self, work: Work, items: list[int], device: torch.device) -> Iterator[tuple[int, Any]]:
        """(item, work(item)) as they are done. `work` is pickled: a function of a module, or partial of one."""
        payload, threads = pickle.dumps(work), torch.get_num_threads()
        if self.executor == "ray":
            return _on_ray(self.workers, payload, items, threads, device)
        return self._in_processes(payload, items, threads, device)

    def close(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=True, cancel_futures=True)
            self._processes = None

    def _started(self, device: torch.device) -> ProcessPoolExecutor:
        if self._processes is None:
            context = multiprocessing.get_context("spawn")
            how = device.type, context.Value("i", 0)
            self._processes = ProcessPoolExecutor(self.workers, context, _start, how)
        return self._processes

    def _in_processes(self, payload, items, threads, device) -> Iterator[tuple[int, Any]]:
        left, died = list(items), 0
        while left:
            futures: dict[Future, int] = {}
            try:
                futures = {self._started(device).submit(_task, payload, item, threads): item for item in left}
                for future in as_completed(futures):
                    result = future.result()
                    left.remove(futures[future])
                    yield futures[future], result
            except BrokenProcessPool as error:
                self.close()
                died += 1
                if died > RETRIES:
                    raise WorkerError(
                        f"workers died {died} times, last with layers {sorted(left)[: self.workers]} to do; is there "
                        f"memory for {self.workers} of them? Try fewer --workers. Nothing that was finished is lost"
                    ) from error
            finally:
                for future in futures:
                    future.cancel()


def _start(kind: str, started) -> None:
    """In a new worker: takes a GPU in turn, and ends when the process that started it does."""
    with started.get_lock():
        number = started.value
        started.value += 1
    if kind == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=1)
def _work(payload: bytes) -> Work:
    return pickle.loads(payload)


def _task(payload: bytes, item: int, threads: int) -> Any:
    torch.set_num_threads(threads)  # part of the result's last bits
    disable_malloc_cache()
    return _work(payload)(item)


def _ray_folder() -> str:
    """A folder of this process alone for a local cluster, gone with it: another's clean-up cannot take it away. Its
    path is short, since sockets lie in it."""
    folder = tempfile.mkdtemp(prefix="mq-", dir="/tmp" if os.name == "posix" else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _on_ray(workers, payload, items, threads, device) -> Iterator[tuple[int, Any]]:
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray: ray is not installed; pip install 'moesvd-quant[ray]'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        # All cores, not those of this pool: the cluster outlives it, and the next one may have more workers.
        cores = max(workers * threads, os.cpu_count() or 1)
        local = {} if address else {"num_cpus": cores, "include_dashboard": False, "_temp_dir": _ray_folder()}
        ray.init(address, log_to_driver=False, **local)
    gpus = 1 if device.type == "cuda" else 0
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(_task)
    shared, waiting = ray.put(payload), list(items)
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                item = waiting.pop(0)
                running[task.remote(shared, item, threads)] = item
            done, _ = ray.wait(list(running))
            for reference in done:
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    what = f"layer {running[reference]}: its worker died {RETRIES + 1} times: {error}"
                    raise WorkerError(what) from error
                yield running.pop(reference), result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
