"""What lm-eval measured of a task, as records have it."""

from ..recipe.tasks import leaves


def measured(found: dict, name: str, key: str) -> list[tuple[str, dict]]:
    """What lm-eval found of a task or a group that it knows by `key`; of each task of a tag, which has no figures."""
    if key in found["results"]:
        return [(name, _figures(found, key))]
    return [(leaf, _figures(found, leaf)) for leaf in leaves(name)]


def _figures(found: dict, key: str) -> dict:
    """{"acc": ..., "metric": the main one, "n": documents, "shots": examples before each, "correct": a digit each}."""
    inner = [leaf for leaf in _leaves(found, key) if leaf in found["samples"]]
    metrics = {
        name.removesuffix(",none"): float(value)
        for name, value in found["results"][key].items()
        if "," in name and isinstance(value, int | float)
    }
    main = _main_metric(metrics, found["higher_is_better"].get(key, {}))
    correct = "".join(_correct(found["samples"][leaf], main) for leaf in inner) if main else ""
    return (
        metrics
        | ({"metric": main} if main else {})
        | {"n": sum(found["n-samples"][leaf]["effective"] for leaf in inner)}
        | {"shots": max(found["n-shot"].get(leaf, 0) for leaf in inner)}
        | ({"correct": correct} if correct else {})
    )


def _leaves(found: dict, key: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    inner = found["group_subtasks"].get(key, [])
    return [leaf for one in inner for leaf in _leaves(found, one)] if inner else [key]


def _main_metric(metrics: dict[str, float], higher: dict[str, bool | None]) -> str | None:
    """`acc` where there is one, else lm-eval's first that is a share and better when higher."""
    shares = [
        name
        for name, value in metrics.items()
        if "_stderr" not in name and higher.get(name.split(",")[0]) and 0 <= value <= 1
    ]
    return "acc" if "acc" in shares else next(iter(shares), None)


def _correct(samples: list[dict], metric: str) -> str:
    """A digit for each document; nothing where an answer may be right in part."""
    name, _, chosen = metric.partition(",")
    mine = sorted((s for s in samples if s["filter"] == (chosen or "none")), key=lambda sample: sample["doc_id"])
    values = [sample[name] for sample in mine if name in sample]
    return "".join(str(int(value)) for value in values) if set(values) <= {0, 1} else ""
