"""How factorized experts multiply: by a kernel for all parts, bank by bank, or expert by expert. A copy lies in every
checkpoint."""

import torch
import torch.nn.functional as F

from .chains import chains_of
from .native_call import add_bias
from .parts import separate
from .pruned_base import PrunedBase

ONE_BY_ONE = ("cpu",)  # devices on which a product for each expert is as fast as one grouped product


class ExpertProducts(PrunedBase):
    """What `FactorizedExperts` does with pairs of a token and an expert, sorted by expert."""

    def row_map(self, projection, i, bank, device):
        """Bank row of each expert, -1 where the part does not name it, as a cached tensor."""
        key = projection, i, bank, device
        if key not in self._maps:
            part = self.layout[projection][i]
            rows = torch.full((self.experts,), -1, dtype=torch.long)
            rows[part.experts] = torch.tensor(part.users(bank))
            self._maps[key] = rows.to(device)
        return self._maps[key]

    def bank_matmul(self, x, rows, projection, i, bank):
        """y[t] = bank[rows[t]] @ x[t], x (n, in), rows (n) -> (n, out): one grouped product over sorted rows."""
        part = self.layout[projection][i]
        count, (out, _) = max(part.users(bank)) + 1, part.sizes(*self.shapes[projection])[bank]
        if count == 1:
            return self.products(f"{projection}_{i}_{bank}", x, [len(x)])
        order = None if self.owns_rows(part, bank) else torch.argsort(rows, stable=True)
        x = x if order is None else x[order]
        sizes = torch.bincount(rows, minlength=count)
        aligned = out % 8 == 0 and x.shape[-1] % 8 == 0  # the grouped product wants rows of 16 bytes
        if aligned and not part.form(bank).packed and x.device.type not in ONE_BY_ONE:
            weight = self.bank(projection, i, bank, x.dtype)
            y = F.grouped_mm(x, weight.transpose(1, 2), offs=sizes.cumsum(0).int())
            if y.requires_grad:
                y.register_hook(torch.Tensor.contiguous)  # its backward takes no gradient with gaps
        else:  # on a CPU as fast as the grouped product
            y = self.products(f"{projection}_{i}_{bank}", x, sizes.tolist())
        return y if order is None else torch.empty_like(y).index_copy(0, order, y)

    def owns_rows(self, part, bank):
        """Whether each expert has a row of its own, in order: pairs sorted by expert are then sorted by row."""
        return part.users(bank) == list(range(len(part.experts))) and part.experts == sorted(part.experts)

    def steps(self, device_type):
        """{projection: for each expert its terms}, a term being the banks to multiply with, one after the other, as
        arguments of `weight_rows`; None where a bank is shared, or grouped products serve better. Made once."""
        key = "steps", device_type
        if key not in self._maps:
            parts = [part for parts in self.layout.values() for part in parts]
            banks = [(part, bank) for part in parts for bank in part.chain]
            alone = all(
                self.owns_rows(part, bank) and (device_type in ONE_BY_ONE or part.form(bank).packed)
                for part, bank in banks
            )
            served = alone and not any(map(self.shared_input, parts))
            self._maps[key] = {name: self._terms(name) for name in self.layout} if served else None
        return self._maps[key]

    def has_kernels(self, x):
        """Whether a packed bank is multiplied by a kernel, which takes the tokens of all experts at once."""
        found = (name for name, form in self.formats.items() if form.packed)
        return any(self.formats[name].has_kernel(self.bank_tensors(name), x) for name in found)

    def _terms(self, projection):
        terms: list[list] = [[] for _ in range(self.experts)]
        for i, part in enumerate(self.layout[projection]):
            for row, expert in enumerate(part.experts):
                terms[expert].append([(f"{projection}_{i}_{bank}", row) for bank in part.chain])
        return terms

    def by_expert(self, x, token, ids, steps):
        """x (tokens, in) -> (pairs, in), pairs sorted by expert: each expert from gate to down at once, so that what
        lies between stays in the cache, and one packed weight at a time is dequantized."""
        sizes = torch.bincount(ids, minlength=self.experts).tolist()
        done = []
        for expert, (at, own) in enumerate(zip(token.split(sizes), ids.split(sizes))):
            if len(at):
                hidden = x[at]
                pairs = separate({k: self.multiply(hidden, k, steps[k][expert]) for k in steps if k != "down"})
                add_bias(self, self.flags, pairs, own)
                done.append(self.multiply(self.activate(pairs), "down", steps["down"][expert]))
        return torch.cat(done) if done else x.new_zeros(0, self.shapes["down"][0])

    def multiply(self, x, projection, terms):
        """x (n, in) -> (n, out) by the effective weight of one expert, factor by factor."""
        y = None
        for banks in terms:
            h = x
            for name, row in banks:
                h = F.linear(h, self.weight_rows(name, x.dtype, row))
            y = h if y is None else y + h
        return x.new_zeros(len(x), self.shapes[projection][0]) if y is None else y

    def shared_input(self, part):
        """The bank that every token meets whatever its expert, first: a base, or a right factor."""
        first = part.chain[0]
        return first if len(part.experts) == self.experts and max(part.users(first)) == 0 else None

    def project(self, x, token, ids, projection, masks, with_base=True):
        """x (tokens, in) -> (pairs, out) for the (token, expert) pairs; shared banks see each token once.

        masks: {"tokens": (tokens, channels)}, filled by the first projection of a base that is pruned token by token.
        """
        if chains := chains_of(self, projection, x):
            sizes = torch.bincount(ids, minlength=self.experts).tolist()
            return chains[0][0].form.project(chains, x, token, sizes)
        y = None
        for i, part in enumerate(self.layout[projection]):
            first, *rest = part.chain
            shared = self.shared_input(part)
            if shared == "dense":
                if with_base:
                    h = self.apply_base(x, projection, i, masks)[token]
                    y = h if y is None else y + h
                continue
            rows = self.row_map(projection, i, first, x.device)[ids]
            if shared:
                h, chosen = self.bank_matmul(x, rows, projection, i, first)[token], None
            else:
                chosen = None if len(part.experts) == self.experts else (rows >= 0).nonzero()[:, 0]
                if chosen is not None and not len(chosen):
                    continue
                h = x[token if chosen is None else token[chosen]]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, first)
            for bank in rest:
                rows = self.row_map(projection, i, bank, x.device)[ids]
                h = self.bank_matmul(h, rows if chosen is None else rows[chosen], projection, i, bank)
            if chosen is not None:
                h = h.new_zeros(len(ids), h.shape[1]).index_copy(0, chosen, h)
            y = h if y is None else y + h
        return x.new_zeros(len(ids), self.shapes[projection][0]) if y is None else y
