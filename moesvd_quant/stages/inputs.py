"""What the experts of a layer are fitted to, and under which inputs they are judged: the original's, or those that the
compressed model will really give them."""

from ..calibration.metric import Grams, blend, shrink, unknown
from ..calibration.paired import PairedExperts, output_error
from ..memory.lazy import LazySequence, select
from ..model.experts import dense_weight, expert_count, find_experts
from ..model.remaining import members_of, sources_of
from ..model.stream import StreamedModel
from ..planning.context import Context, StageError, errors_of, expert_grams, reached
from ..runtime.factorized_experts import FactorizedExperts
from ..runtime.parts import JOINT


class OriginalInputs:
    """The input checkpoint's weights, under the inputs that the original model gives them."""

    def __init__(self, context: Context, experts, statistics: dict, path: str):
        known = reached(statistics, path)
        self.experts = experts
        # A whole matrix loses little everywhere: its own inputs tell best. Factors have to choose what to keep.
        sources = members_of(experts)
        self.own = expert_grams(statistics, path, context.device, shrink if known else unknown, sources)
        self.blended = expert_grams(statistics, path, context.device, blend, sources) if known else self.own

    def weights(self, name: str, made: FactorizedExperts) -> LazySequence:
        """What a projection should be, (out, in) float32 by expert."""
        return LazySequence(expert_count(self.experts), lambda e: dense_weight(self.experts, name, e))

    def grams(self, name: str, factors: bool) -> Grams:
        """Gram matrices (in, in) by expert, for factors or for whole matrices."""
        return self.blended[name] if factors else self.own[name]

    def errors(self, made: FactorizedExperts) -> dict[str, list[float]]:
        """Whitened error of every matrix, {projection: [per expert]}."""
        return errors_of(made, {name: self.weights(name, made) for name in made.layout}, self.own)


class PairedInputs:
    """The original's outputs as targets, under the inputs that the layers compressed before now give.

    Down has to be asked for last: its inputs are what gate and up of `made` give.
    """

    def __init__(self, context: Context, pair: PairedExperts, statistics: dict, path: str):
        self.pair, self.device = pair, context.device
        kept = [group[0] for group in pair.sources]
        gram_in, gram_mid = (statistics[f"{path}/{key}"] for key in ("gram_in", "gram_mid"))
        self.original = {"gate": select(gram_in, kept), "down": select(gram_mid, kept)}
        self.original |= dict.fromkeys(("up", JOINT), self.original["gate"])
        self.sums = dict.fromkeys(("gate", "up", JOINT), pair.gate_up)

    def weights(self, name: str, made: FactorizedExperts) -> LazySequence:
        """What a projection should be, (out, in) float64 by expert: corrected for its inputs."""
        if name not in self.sums:
            self.sums[name] = self.pair.down(made)
        return self.pair.targets(name, self.sums[name])

    def grams(self, name: str, factors: bool) -> Grams:
        """Gram matrices (in, in) by expert, for factors or for whole matrices; after `weights`."""
        return Grams(self.sums[name].gram, self.pair.tokens, blend if factors else shrink, self.device)

    def errors(self, made: FactorizedExperts) -> dict[str, list[float]]:
        """Error of every matrix's output beside the original's, relative, {projection: [per expert]}."""
        found = {}
        for name in made.layout:
            weights = self.pair.weights(name)
            sums = self.original[name], *self.sums[name]
            found[name] = [
                output_error(weights[e], made.dense(name, e), *(total[e].to(self.device) for total in sums))
                for e in range(made.experts)
            ]
        return found


def require_originals(parent: StreamedModel) -> None:
    """Before any walk: StageError where experts have no original whose outputs they could be fitted to."""
    for layer, name in zip(parent.layers, parent.layer_names):
        for path, experts in find_experts(layer):
            if any(len(group) > 1 for group in sources_of(experts)):
                raise StageError(
                    f"{name}.{path}: some of its experts are merged of several: there is no original to learn from; "
                    "leave out error_aware"
                )


def inputs_of(
    context: Context, error_aware: bool, experts, statistics: dict, path: str
) -> OriginalInputs | PairedInputs:
    """The inputs that a stage fits experts to. Experts that no token reaches have no others than the original's."""
    if error_aware and reached(statistics, path):
        return PairedInputs(context, context.paired_walk().experts(path, sources_of(experts)), statistics, path)
    return OriginalInputs(context, experts, statistics, path)
