"""GPTQ against the algorithm written out, rounding against its formula, and the packed form against both."""

import pytest
import torch

from moesvd_quant.decompose.whitening import whitened_error
from moesvd_quant.export.gptq_format import to_standard
from moesvd_quant.quantize import gptq as feedback
from moesvd_quant.quantize import grid as grids
from moesvd_quant.quantize.codec import QuantizeError
from moesvd_quant.quantize.feedback import HessianFactor
from moesvd_quant.quantize.gptq import gptq
from moesvd_quant.quantize.rounding import resolve_group_size, round_to_nearest
from moesvd_quant.runtime.grids import Grid


def problem(out=48, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.rand(columns, generator=generator) ** 2
    return torch.randn(out, columns, generator=generator), x.T @ x


def grid(weight, bits, size, sym):
    """(scale, zero) per group, from the range of its weights, zero included."""
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / (2**bits - 1)
    return scale, torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round()


def clipped_grid(weight, bits, size, sym, column_weight):
    """Of all scales in sixteenths of an octave below that which covers all of the matrix, and both zeros beside the
    ideal one, those with the least sum of column_weight times error squared in each group."""
    groups, column_weight = weight.unflatten(1, (-1, size)).double(), column_weight.unflatten(0, (-1, size))
    full, zero = (t.double() for t in grid(weight, bits, size, sym))
    top = 2**bits - 1
    span = 2 * weight.abs().max() * top / (top - 1) if sym else weight.max() - weight.min()
    best_scale, best_zero, best = full.clone(), zero.clone(), torch.full_like(full, torch.inf)
    ideal = -groups.amin(2).clamp(max=0) / full
    for level in range(80):
        scale = torch.full_like(full, float(span) / top * 2 ** (-level / 16))
        for offset in [zero] if sym else [ideal.floor(), ideal.ceil()]:
            codes = ((groups / scale[..., None]).round() + offset[..., None]).clamp(0, 2**bits - 1)
            loss = (((codes - offset[..., None]) * scale[..., None] - groups).square() * column_weight).sum(2)
            best_scale, best_zero = (
                torch.where(loss < best, new, old) for new, old in ((scale, best_scale), (offset, best_zero))
            )
            best = torch.minimum(loss, best)
    return best_scale, best_zero


def written_out_gptq(weight, gram, bits, size, sym, damp):
    """Frantar et al., algorithm 1, one column at a time in order of activation, groups fixed beforehand."""
    weight, hessian = weight.double().clone(), gram.double().clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(hessian[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    column_weight = torch.empty(len(order), dtype=torch.float64)
    column_weight[order] = 1 / upper.diagonal().square()
    scale, zero = clipped_grid(weight, bits, size, sym, column_weight)
    result = torch.zeros_like(weight)
    for step, column in enumerate(order.tolist()):
        s, z = scale[:, column // size], zero[:, column // size]
        value = ((weight[:, column] / s + z).round().clamp(0, 2**bits - 1) - z) * s
        result[:, column] = value
        error = (weight[:, column] - value) / upper[step, step]
        later = order[step + 1 :]
        weight[:, later] -= error[:, None] * upper[step, step + 1 :]
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_as_good_as_gptq_written_out_and_better_than_rounding(bits, sym):
    weight, gram = problem()
    form = Grid(bits, 32, sym)
    got = whitened_error(weight, gptq(weight, HessianFactor.of(gram, 0.01), form).dense(), gram)
    expected = whitened_error(weight, written_out_gptq(weight, gram, bits, 32, sym, 0.01), gram)
    assert got == pytest.approx(expected, rel=0.05)  # of scales beyond a group's range by chance one is better
    assert got < 0.7 * whitened_error(weight, round_to_nearest(weight, form).dense(), gram)


@pytest.mark.parametrize("bits,gain", [(2, 0.97), (3, 0.96), (4, 0.97)])
def test_better_than_the_grids_that_gptqmodel_finds(bits, gain):
    """The same core with its own search for the range, and scales of any value."""
    from gptqmodel.quantization import GPTQ, GPTQConfig

    weight, gram = problem()
    config = GPTQConfig(
        bits=bits, group_size=32, sym=False, desc_act=True, act_group_aware=False, static_groups=True,
        damp_percent=0.01, mse=2.4, offload_to_disk=False,
    )  # fmt: skip
    linear = torch.nn.Linear(128, 48, bias=False)
    linear.weight.data = weight.clone()
    core = GPTQ(linear, qcfg=config)
    core.quantizer.configure(perchannel=True, bits=bits, sym=False)
    core.H, core.nsamples, core._hessian_dirty = gram / gram.diagonal().mean(), 129, False
    theirs = whitened_error(weight, core.quantize()[0], gram)
    ours = gptq(weight, HessianFactor.of(gram, 0.01), Grid(bits, 32, False))
    assert whitened_error(weight, ours.dense(), gram) < gain * theirs


@pytest.mark.parametrize("sym", [False, True])
def test_rounding_is_the_nearest_grid_point(sym):
    weight, _ = problem()
    form = Grid(4, 32, sym)
    packed, (scale, _) = round_to_nearest(weight, form), grid(weight, 4, 32, sym)
    assert ((form.scale(packed.tensors) / scale).log2().abs() <= 1 / 32 + 1e-4).all()
    # Half a step, and what the range may lack at its ends: up to 2.2 % of the steps on the longer side of zero, and the
    # half step that zero itself is rounded by.
    error = (weight - packed.dense(torch.float32)).abs() / form.scale(packed.tensors).repeat_interleave(32, 1)
    assert error.max() <= 0.5 + 0.022 * 15 + 0.5 and error.mean() < 0.27  # a uniform error's mean is 1/4


def test_a_short_last_group():
    weight, gram = problem(columns=80)
    packed = gptq(weight, HessianFactor.of(gram, 0.01), Grid(4, 64, False))
    assert packed.tensors["scales"].shape == (48, 2)
    assert whitened_error(weight, packed.dense(), gram) < 0.01


def test_scale_of_the_gram_matrix_does_not_matter():
    weight, gram = problem()
    form = Grid(3, 32, False)
    small, large = (gptq(weight, HessianFactor.of(gram * factor, 0.01), form).dense() for factor in (1e-9, 1e9))
    assert torch.equal(small, large)


def test_a_weight_that_is_trained_is_quantized_as_well():
    weight, gram = problem()
    form, inputs = Grid(3, 32, False), HessianFactor.of(gram, 0.01)
    trained = gptq(torch.nn.Parameter(weight), inputs, form).dense()
    assert torch.equal(trained, gptq(weight, inputs, form).dense()) and not trained.requires_grad


def test_one_input_direction_alone_still_works():
    weight, _ = problem()
    x = torch.ones(1, 128)
    packed = gptq(weight, HessianFactor.of(x.T @ x, 0.01), Grid(4, 32, False))
    assert torch.isfinite(packed.dense()).all()


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w, g: (w, g * 0), "Gram matrix of the inputs is zero"),
        (lambda w, g: (w * 1e6, g), "overflows fp16"),
    ],
)
def test_what_cannot_be_stored_is_an_error(change, message):
    weight, gram = change(*problem())
    with pytest.raises(QuantizeError, match=message):
        gptq(weight, HessianFactor.of(gram, 0.01), Grid(4, 32, False))


def test_a_scale_that_fp16_lacks_is_stored_and_not_exported():
    weight, gram = problem(out=64)
    form = Grid(4, 32, True)
    packed = gptq(weight * 1e-12, HessianFactor.of(gram, 0.01), form)
    same = gptq(weight, HessianFactor.of(gram, 0.01), form)
    assert torch.allclose(packed.dense() * 1e12, same.dense(), rtol=1e-3, atol=0.1)
    with pytest.raises(QuantizeError, match="underflows fp16"):
        to_standard(packed, None)


def test_group_sizes():
    assert [resolve_group_size("auto", n) for n in (4096, 192, 96, 80)] == [128, 64, 32, 80]
    assert resolve_group_size("auto", 48, rank_axis=True) == 48
    assert resolve_group_size(128, 80, rank_axis=True) == 80
    with pytest.raises(QuantizeError, match="group_size 128 does not divide 192"):
        resolve_group_size(128, 192)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_standard_form_gives_the_same_outputs_in_gptqmodel(bits):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    weight, gram = problem(out=64)
    form = Grid(bits, 32, True)
    packed = gptq(weight, HessianFactor.of(gram, 0.01), form)
    shape = dict(in_features=128, out_features=64, bias=False)
    module = TorchLinear(bits=bits, group_size=32, sym=True, desc_act=False, **shape)
    module.load_state_dict(to_standard(packed, None))
    module.qzero_format(format=1)
    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    got, expected = module(x.half()).float(), x.half().float() @ packed.dense(torch.float32).T
    assert torch.allclose(got, expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("sym", [False, True])
def test_what_is_compiled_rounds_as_what_runs_on_gpus(sym):
    """The feedback in a block against the same written with torch; and a row's grid is the same without the others."""
    weight, gram = problem(out=150, columns=96)
    form, inputs = Grid(3, 32, sym), HessianFactor.of(gram, 0.05)
    base, rest = grids.largest_scale(weight, form), weight.T[inputs.order].contiguous()
    torch.manual_seed(0)
    scale, zero = 0.2 + torch.rand(3, 150), torch.randint(0, 8, (3, 150)).float()
    group, wanted = inputs.order // 32, rest + 0.1 * torch.randn(rest.shape)
    made = []
    for round_block in (feedback._round_block, feedback._round_block_on_gpu):
        lost, codes = torch.empty_like(rest), torch.empty_like(rest, dtype=torch.uint8)
        round_block(wanted, inputs.upper, rest, scale, zero, group, 7, lost, codes)
        made.append((lost, codes))
    assert (made[0][1] != made[1][1]).float().mean() < 1e-3  # a tie may fall to either side
    assert (made[0][0] - made[1][0]).abs().median() < 1e-6
    columns, matter = weight.T[:32].contiguous(), inputs.conditional_variance[:32]
    mine = grids.best_grid(columns, matter, base, form)
    again = grids.best_grid(columns[:, 7:8].contiguous(), matter, base, form)
    assert all(torch.equal(one[7:8], two) for one, two in zip(mine, again))  # rows know nothing of each other


def test_threads_change_no_bit():
    weight, gram = problem(out=1100, columns=128)
    inputs, before, made = HessianFactor.of(gram, 0.05), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(gptq(weight, inputs, Grid(3, 64, False)).tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0][kind], other[kind]) for other in made[1:] for kind in made[0])
