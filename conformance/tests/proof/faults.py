"""Kernels with the right mathematics and a fault of another kind; each is one that a certain check alone can see."""

import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from isolith import OPERATORS, ArgumentError, NoKernelError


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A faulty kernel.

    Args:
        name: What it does wrong.
        check: The check that must see it.
        operator: What it computes.
        make: Makes the kernel, with whatever state it keeps.
        validates: Whether illegal calls are refused before it.
        refuses: Whether it takes no call at all.
        batch_invariant: What it claims.
    """

    name: str
    check: str
    operator: str
    make: Callable[[], Callable]
    validates: bool = True
    refuses: bool = False
    batch_invariant: bool = False


FAULTS: list[Fault] = []


def fault(check: str, operator: str, **flags: bool) -> Callable:
    """Add the factory below, which gets the reference and returns a kernel, to the list."""

    def add(make):
        reference = OPERATORS[operator].reference
        name = make.__name__
        FAULTS.append(Fault(name=name, check=check, operator=operator, make=partial(make, reference), **flags))
        return make

    return add


@fault("poison", "rms_norm")
def adds_a_workspace_that_it_has_not_written(reference):
    def kernel(**given):
        result = reference(**given)
        scratch = torch.empty(1)
        return torch.where(scratch.isnan(), scratch.to(result.dtype), result)

    return kernel


@fault("guard zones", "swiglu")
def writes_one_element_behind_its_workspace(reference):
    def kernel(**given):
        scratch = torch.empty(16)
        scratch.as_strided((1,), (1,), scratch.storage_offset() + 16).fill_(0.0) if scratch.storage_offset() else None
        return reference(**given)

    return kernel


@fault("inputs unchanged", "hc_head")
def normalises_the_zeros_of_its_weights(reference):
    def kernel(**given):
        result = reference(**given)
        for name in ("fn", "scale", "base"):
            given[name].masked_fill_(given[name] == 0, -0.0)
        given["base"][:1] = torch.nextafter(given["base"][:1], given["base"][:1] * 2)
        return result

    return kernel


@fault("unused input", "moe_hash_gate")
def checks_the_whole_table(reference):
    def kernel(**given):
        result = reference(**given)
        if given["table"].numel() and int(given["table"].max()) > 1 << 20:
            return tuple(torch.zeros_like(part) for part in result)
        return result

    return kernel


@fault("layout", "hc_post")
def loads_vectors_from_unaligned_addresses(reference):
    def kernel(**given):
        result = reference(**given)
        return result + 1 if given["streams"].data_ptr() % 16 else result

    return kernel


@fault("aliasing", "head_rms_norm")
def returns_one_buffer_for_every_call(reference):
    held = {}

    def kernel(**given):
        result = reference(**given)
        key = (threading.get_ident(), result.shape, result.dtype)
        return held.setdefault(key, torch.empty_like(result)).copy_(result)

    return kernel


@fault("same tensor", "rope")
def takes_two_arguments_at_one_address_for_a_mistake(reference):
    def kernel(**given):
        tensors = [value.data_ptr() for value in given.values() if isinstance(value, Tensor) and value.numel()]
        result = reference(**given)
        return result * 0 if len(set(tensors)) < len(tensors) else result

    return kernel


@fault("determinism", "sinkhorn")
def adds_noise_below_the_limits(reference):
    noise = random.Random()  # seeded by the system: other in every process, and no two runs alike

    def kernel(**given):
        result = reference(**given)
        if not result.numel():
            return result
        place = noise.randrange(result.numel())
        flat = result.flatten()
        flat[place] = torch.nextafter(flat[place], flat[place] + 1)
        return flat.reshape(result.shape)

    return kernel


@fault("first call", "hc_head")
def is_wrong_until_it_has_warmed_up(reference):
    calls = []

    def kernel(**given):
        calls.append(1)
        result = reference(**given)
        return result if len(calls) > 1 else result + 1

    return kernel


@fault("batch invariance", "rms_norm", batch_invariant=True)
def sums_otherwise_in_a_batch_of_one_than_it_claims(reference):
    def kernel(**given):
        result = reference(**given)
        x = given["x"]
        if x.dim() < 2 or x.shape[0] > 1 or not x.numel():
            return result
        flat = result.flatten().clone()
        flat[0] = torch.nextafter(flat[0], flat[0] + 1) if flat[0].isfinite() else flat[0]
        return flat.reshape(result.shape)

    return kernel


@fault("schedule", "sinkhorn")
def splits_wrongly_over_three_threads(reference):
    def kernel(**given):
        result = reference(**given)
        return result * 0 if torch.get_num_threads() == 3 else result

    return kernel


@fault("side by side", "hc_post")
def keeps_its_scratch_in_a_global(reference):
    scratch = {}

    def kernel(**given):
        scratch["owner"] = threading.get_ident()
        result = reference(**given)
        time.sleep(0.005)
        return result if scratch["owner"] == threading.get_ident() else result * 0

    return kernel


@fault("nothing left running", "swiglu")
def leaves_a_thread_behind(reference):
    def kernel(**given):
        threading.Thread(target=time.sleep, args=(10,), daemon=True).start()
        return reference(**given)

    return kernel


@fault("NaN containment", "hc_post")
def scales_by_the_largest_value_of_the_whole_batch(reference):
    def kernel(**given):
        result = reference(**given)
        return result if given["x"].isfinite().all() else torch.full_like(result, torch.nan)

    return kernel


@fault("large", "sinkhorn")
def counts_rows_in_sixteen_bits(reference):
    def kernel(**given):
        result = reference(**given)
        result[1 << 15 :] = 0
        return result

    return kernel


@fault("errors", "rms_norm", validates=False)
def takes_illegal_calls(reference):
    def kernel(**given):
        try:
            return reference(**given)
        except (RuntimeError, TypeError):
            return given["x"].clone()

    return kernel


@fault("executed", "block_dequant")
def runs_the_reference(reference):
    def kernel(**given):
        return reference(**given)

    return kernel


@fault("claims", "hc_post")
def refuses_some_calls_without_a_reason(reference):
    def kernel(**given):
        if given["x"].shape[0] % 2:
            raise NoKernelError("")
        return reference(**given)

    return kernel


@fault("claims something", "hc_post", refuses=True)
def refuses_every_call(reference):
    return reference


@fault("fresh values", "swiglu")
def remembers_results_by_tensor(reference):
    held = threading.local()

    def kernel(**given):
        if getattr(held, "tensor", lambda: None)() is not given["x"]:
            held.tensor, held.result = weakref.ref(given["x"]), reference(**given)
        return held.result.clone()

    return kernel


@fault("mapping", "moe_permute")
def mixes_two_rows_up_beyond_80000_tokens(reference):
    def kernel(**given):
        results = list(reference(**given))
        if given["x"].shape[0] > 80000:
            results[4][:2] = results[4][:2].flip(0)
        return tuple(results)

    return kernel


@fault("relations", "grouped_gemm")
def drops_the_last_term_of_sums_over_more_than_4096(reference):
    def kernel(**given):
        x, weight = given["x"], given["weight"]
        if x.dtype.itemsize > 1 and x.shape[-1] == weight.shape[-1] > 4096:
            given |= {"x": x[..., :-1], "weight": weight[..., :-1]}
        return reference(**given)

    return kernel


@fault("after an error", "swiglu", validates=False)
def is_broken_by_an_illegal_call(reference):
    broken = []

    def kernel(**given):
        operator = OPERATORS["swiglu"]
        try:
            given = operator.arguments(**given)
            operator.validate(given)
        except ArgumentError:
            broken.append(1)
            raise
        result = reference(**given)
        return result + 1 if broken else result

    return kernel
