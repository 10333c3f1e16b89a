"""Runs DeepSeek V3, V3.2 and V4 of Hugging Face transformers through isolith's operators.

import isolith_transformers
isolith_transformers.apply(model)       # in place: same weights, same state_dict, same calls
model.generate(ids, max_new_tokens=20)
isolith_transformers.undo(model)
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from isolith import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Applied", "apply", "undo"]

TRANSFORMERS = "5.23"
FAMILIES = {"DeepseekV3ForCausalLM": "v3", "DeepseekV32ForCausalLM": "v3", "DeepseekV4ForCausalLM": "v4"}
FLOAT = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STATIC_ROPE = ("default", "linear", "yarn")  # the others change their frequencies with the length


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A changed model.

    Args:
        model: The model.
        experts_implementation: What transformers' experts interface used before.
    """

    model: "PreTrainedModel"
    experts_implementation: dict[str, str | None]

    def undo(self) -> None:
        """Give the model its own functions back."""
        undo(self.model)


def apply(model: "PreTrainedModel", *, block_size: int = 64) -> Applied:
    """Make a model compute through isolith's operators, in place and until `undo`.

    Its parameters stay where they are and keep their names. Caches that it makes, and empty DynamicCaches that it is
    given, hold paged pools.

    Args:
        model: A DeepseekV3ForCausalLM, DeepseekV32ForCausalLM or DeepseekV4ForCausalLM.
        block_size: Tokens or entries of a block of a pool.

    Raises:
        ArgumentError: for a model that the operators cannot run; it is unchanged then.
    """
    family = family_of(model)
    check_model(model, family, block_size)
    modules = import_module("isolith_transformers.modules")
    experts_interface = import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    base = model.model
    runtime = modules.Runtime(kinds=family.kinds(model.config, block_size), rotaries=family.rotaries(base))
    experts_interface.register(modules.EXPERTS, modules.experts)
    applied = Applied(model=model, experts_implementation=model.get_experts_implementation())
    model.set_experts_implementation(modules.EXPERTS)
    for module in base.modules():
        if type(module) in family.FORWARDS:
            module.forward = MethodType(family.FORWARDS[type(module)], module)
    base.isolith_runtime = runtime
    model.isolith_applied = applied  # type: ignore[assignment]  # modules type attributes as their own parts
    return applied


def undo(model: "PreTrainedModel") -> None:
    """Give a changed model its own functions back.

    Raises:
        ArgumentError: when `apply` has not changed it.
    """
    applied = vars(model).get("isolith_applied")
    if applied is None:
        raise ArgumentError("isolith_transformers: undo takes a model that apply has changed; got one that it has not.")
    family = family_of(model)
    for module in model.modules():
        if type(module) in family.FORWARDS:
            del module.forward
    model.set_experts_implementation(applied.experts_implementation)
    del model.model.isolith_runtime
    del model.isolith_applied


def family_of(model: Any) -> Any:  # Any: whatever a caller passed; a module of this package
    """The module of forward functions for a model. It is imported here: it needs the right transformers."""
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        raise ArgumentError(f"isolith_transformers: model must be one of {', '.join(FAMILIES)}; got {name}.")
    if version("transformers").split(".")[:2] != TRANSFORMERS.split("."):
        raise ArgumentError(
            f"isolith_transformers: transformers must be {TRANSFORMERS}, whose modules this knows; "
            f"got {version('transformers')}."
        )
    return import_module(f"isolith_transformers.{FAMILIES[name]}")


def check_model(model: "PreTrainedModel", family: Any, block_size: int) -> None:  # Any: a module of this package
    """Raise ArgumentError for a model that the operators cannot run."""
    config = model.config
    if "isolith_applied" in vars(model):
        raise ArgumentError("isolith_transformers: a model is changed once; got one that apply has changed before.")
    if block_size < 1:
        raise ArgumentError(f"isolith_transformers: block_size must be at least 1; got {block_size}.")
    if config.hidden_act not in ("silu", "swish"):
        raise ArgumentError(f"isolith_transformers: hidden_act must be silu; got {config.hidden_act!r}.")
    for rope_type in family.rope_types(config):
        if rope_type not in STATIC_ROPE:
            raise ArgumentError(
                f"isolith_transformers: rope_type must be {', '.join(STATIC_ROPE[:-1])} or {STATIC_ROPE[-1]}; "
                f"got {rope_type!r}."
            )
    reason = family.why_not(config)
    if reason is not None:
        raise ArgumentError(f"isolith_transformers: {reason}.")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOAT:
            raise ArgumentError(
                f"isolith_transformers: weights must be bfloat16, float16, float32 or float64; got {name} in "
                f"{str(parameter.dtype).removeprefix('torch.')}. Load the model without quantisation."
            )
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise ArgumentError(
                f"isolith_transformers: modules must have their class's own forward; got another in {name or 'model'}."
            )
