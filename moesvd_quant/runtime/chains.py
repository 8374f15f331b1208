"""Which projections a kernel serves whole, all parts at once. A copy lies in every checkpoint."""

from .formats import Link


def chains_of(experts, projection: str, x) -> list[list[Link]]:
    """The parts of a projection of factorized experts as `Format.project` takes them; none where there is no kernel for
    all of them, or for x."""
    if projection not in experts.described:
        experts.described[projection] = _served_whole(experts, projection)
    found = []
    for links in experts.described[projection] if x.device.type == "cpu" else []:
        chain = [Link(form, shape, experts.aligned(name), rows) for name, form, shape, rows in links]
        if not all(link.form.has_kernel(link.stored, x) for link in chain):
            return []
        found.append(chain)
    return found


def _served_whole(experts, projection: str) -> list[list[tuple]]:
    """For each part its banks: name, format, shape of a matrix, and which one each expert uses; none where no kernel
    takes them together."""
    parts, chains = experts.layout[projection], []
    for i, part in enumerate(parts):
        sizes, links = part.sizes(*experts.shapes[projection]), []
        for bank in part.chain:
            used = dict(zip(part.experts, part.users(bank)))
            rows = [used.get(expert, -1) for expert in range(experts.experts)]
            links.append((f"{projection}_{i}_{bank}", part.form(bank), sizes[bank], rows))
        chains.append(links)
    named = [expert for part in parts for expert in part.experts]
    forms = {type(form) for links in chains for _, form, *_ in links}
    if len(named) != len(set(named)) or len(forms) != 1 or any(map(experts.shared_input, parts)):
        return []
    without = [[Link(form, shape, {}, rows) for _, form, shape, rows in links] for links in chains]
    return chains if forms.pop().fit_together(without) else []
